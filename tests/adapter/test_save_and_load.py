"""What requires grad after a file was loaded: the selection at first, everything where it is loaded over what is there."""

import pytest
from helpers.models import make_batch, make_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.adapter.values import layers, set_selection, set_values


TENSORS = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]


def trained(model):
    """What requires grad, by the names that tensors have in the base model."""
    return {
        f"{key}.{name}"
        for key, layer in layers(model).items()
        for name, value in layer.greentrainer_values["default"].items()
        if value.requires_grad
    }


@pytest.fixture
def path(tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    set_values(model.get_base_model(), "default", TENSORS)
    set_selection(model.get_base_model(), "default", TENSORS[:2])
    model.save_pretrained(tmp_path)
    return tmp_path


def check_says_selected(model):
    config = model.peft_config["default"]
    assert set(config.tensors) == set(TENSORS) and set(config.selected) == set(TENSORS[:2]) and not config.provisional


def test_a_loaded_adapter_trains_what_was_selected(path):
    model = PeftModel.from_pretrained(make_model("llama"), path, is_trainable=True)
    check_says_selected(model)
    assert trained(model) == set(TENSORS[:2])


def test_what_is_loaded_again_may_all_have_a_place_in_an_optimizer(path):
    """Until the first pass; whether the adapter came from a file or not."""
    model = PeftModel.from_pretrained(make_model("llama"), path, is_trainable=True)
    for _ in range(2):
        model.load_adapter(path, "default", is_trainable=True)
        check_says_selected(model)
        assert trained(model) == set(TENSORS)
        model(**make_batch("llama")).loss.backward()
        assert trained(model) == set(TENSORS[:2])
        check_says_selected(model)


def test_a_file_with_other_values_is_followed(path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    state = get_peft_model_state_dict(PeftModel.from_pretrained(make_model("llama"), path))
    set_peft_model_state_dict(model, state)
    config = model.peft_config["default"]
    assert set(config.tensors) == set(config.selected) == trained(model) == set(TENSORS)
    set_peft_model_state_dict(model, state)
    assert trained(model) == set(TENSORS)


def test_the_config_follows_the_layers():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    base, config = model.get_base_model(), model.peft_config["default"]
    set_values(base, "default", TENSORS)
    set_selection(base, "default", TENSORS)
    prints = dict(config.tensors)
    assert list(prints) == sorted(prints, key=[name for name, _ in make_model("llama").named_parameters()].index)
    set_values(base, "default", TENSORS[1:])  # which drops one that is selected
    assert set(config.tensors) == set(config.selected) == trained(model) == set(TENSORS[1:])
    assert all(prints[name] is config.tensors[name] for name in config.tensors)
    set_selection(base, "default", TENSORS[2:], provisional=True)
    assert config.selected == TENSORS[2:] and config.provisional
    assert layers(base)["lm_head"].greentrainer_values["default"].is_provisional
    with pytest.raises(ValueError, match="no place for .*no.such.weight"):
        set_values(base, "default", ["no.such.weight"])
    assert set(config.tensors) == set(TENSORS[1:])
