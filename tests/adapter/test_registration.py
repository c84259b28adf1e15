"""What importing registers with peft: a type, a config and a tuner that peft's own ways in find."""

import copy

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType

import peft_greentrainer
from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.adapter.values import candidates


def test_importing_registers_and_reloading_is_harmless():
    import importlib

    importlib.reload(peft_greentrainer)
    assert PeftType("GREENTRAINER") is PeftType.GREENTRAINER and "GREENTRAINER" in list(PeftType)
    importlib.reload(peft_greentrainer.registration).add_peft_type()
    config = GreenTrainerConfig(rho=0.4)
    assert config.peft_type is PeftType.GREENTRAINER
    assert isinstance(get_peft_model(make_model("llama"), config), PeftModel)


def test_auto_classes_load_a_delta(tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
    train_a_little(model, "llama")
    model.save_pretrained(tmp_path / "delta")
    config = PeftConfig.from_pretrained(tmp_path / "delta")
    assert isinstance(config, GreenTrainerConfig) and config.rho == 0.5
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))
    go_on = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "delta", is_trainable=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and [n for n, p in go_on.named_parameters() if p.requires_grad] == names


def test_modules_to_save_are_trained_and_saved(tmp_path):
    base = make_model("convnet")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(modules_to_save=["head"]))
    assert not any(
        name.startswith("head.") for name in candidates(model.get_base_model(), model.peft_config["default"])
    )
    train_a_little(model, "convnet")
    after = outputs(model, "convnet")
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), "convnet"), after)


def test_an_adapter_that_has_no_place_in_some_modules_is_trained_alone():
    for first, second in (({}, {"target_modules": ["q_proj"]}), ({"target_modules": ["q_proj"]}, {})):
        model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.9, **first))
        model.add_adapter("second", GreenTrainerConfig(rho=0.9, **second))
        model.set_adapter("second")
        Loop(model).run(3)
        assert model.base_model.selection.tensors
        assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)


def test_what_is_not_supported_is_refused():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    with pytest.raises(ValueError, match="adapter_names"):
        model(**make_batch("llama"), adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="Add the adapter with modules_to_save first"):
        model.add_adapter("second", GreenTrainerConfig(modules_to_save=["lm_head"]))
