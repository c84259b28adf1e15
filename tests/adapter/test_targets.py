"""What may be trained: targets and exclusions by name, and deltas that belong to another base."""

import copy
import json

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_model
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError

from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer
from peft_greentrainer.adapter.values import candidates, layers, set_selection, set_values


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        (
            {"target_modules": r".*layers\.1\..*_proj"},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (
            {"target_modules": "all-linear"},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ({"target_modules": ["q_proj", "norm"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, {"q_proj", "norm"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}, {"q_proj"}),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, set(LINEAR)),
        ({"layers_to_transform": 2}, {*LINEAR, "input_layernorm", "post_attention_layernorm"}),
    ],
)
def test_targets(options, expected, tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(**options))
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert {name.split(".")[-2] for name in found} == expected
    assert "model.layers.0.self_attn.q_proj.weight" not in found or not {*options} & {
        "exclude_modules",
        "layers_to_transform",
    }
    if "layers_to_transform" in options:
        numbers = options["layers_to_transform"]
        expected = {numbers} if isinstance(numbers, int) else {*numbers}
        assert {int(name.split(".")[2]) for name in found} == expected
        assert {int(name.split(".")[2]) for name in layers(model.get_base_model())} == expected
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(make_model("llama"), tmp_path)


def test_a_second_adapter_takes_the_same_targets():
    for options in ({"target_modules": "all-linear"}, {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}):
        model = get_peft_model(make_model("llama"), GreenTrainerConfig(**options))
        model.add_adapter("second", GreenTrainerConfig(**options))
        base = model.get_base_model()
        assert candidates(base, model.peft_config["second"]) == candidates(base, model.peft_config["default"])


def test_a_target_in_the_head_of_a_task_is_trained_with_the_head():
    options = {"target_modules": ["query", "classifier"], "task_type": "SEQ_CLS"}
    model = get_peft_model(make_model("bert-sequences"), GreenTrainerConfig(**options))
    model.add_adapter("second", GreenTrainerConfig(**options))
    for adapter in ("default", "second"):
        assert all(".query." in name for name in candidates(model.get_base_model(), model.peft_config[adapter]))


def test_excluding_one_use_of_a_tied_tensor_excludes_it():
    model = get_peft_model(make_model("llama-tied"), GreenTrainerConfig(exclude_modules=["lm_head"]))
    assert "model.embed_tokens.weight" not in candidates(model.get_base_model(), model.peft_config["default"])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_modules": ["q_proj", "nothing"]}, "target_modules='nothing'"),
        ({"target_modules": r"nothing\..*"}, r"target_modules='nothing\\\\..*'"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules='nothing'"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save='nothing'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, "layers_to_transform=7"),
        ({"layers_to_transform": 3}, "layers_to_transform=3"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern='blocks'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_by_name(options, name):
    base = make_model("llama")
    with pytest.raises(NoMatchingPeftModuleError, match=f"{name}.*matches no module"):
        get_peft_model(base, GreenTrainerConfig(**options))
    assert not any(isinstance(module, GreenTrainerLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rho": 0.0}, "rho must be in"),
        ({"rho": 1.5}, "rho must be in"),
        ({"rho": "0.5"}, "rho must be in"),
        ({"rho": None}, "rho must be in"),
        ({"reselect": 0}, "reselect"),
        ({"reselect": True}, "reselect"),
        ({"importance_batches": 1.5}, "importance_batches"),
        ({"unit": "watts"}, "unit"),
        ({"target_modules": "(unbalanced"}, "no regular expression"),
        ({"layers_pattern": "layers"}, "set layers_to_transform"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, "name the layers in the expression"),
        ({"reselect": "often"}, "reselect"),
        ({"importance_batches": 0}, "importance_batches"),
        ({"probe_batch_size": 0}, "probe_batch_size"),
        ({"format_version": 99}, "install -U"),
    ],
)
def test_bad_config(options, match):
    with pytest.raises(ValueError, match=match):
        GreenTrainerConfig(**options)


def test_a_delta_on_another_base_is_refused_by_name(tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    train_a_little(model, "llama", ["lm_head.weight"])
    model.save_pretrained(tmp_path)
    retrained = make_model("llama")
    retrained.lm_head.weight.data *= 1.1
    for other in (retrained, make_model("llama", vocab_size=100)):
        with pytest.raises(ValueError, match="lm_head.weight.*trained on"):
            PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="not a candidate tensor of this model.*trained on"):
        PeftModel.from_pretrained(make_model("bert"), tmp_path)
    renamed = make_model("llama")
    renamed.output = renamed.lm_head
    del renamed.lm_head
    with pytest.raises(ValueError, match="lm_head.weight, which is not a candidate.*trained on"):
        PeftModel.from_pretrained(renamed, tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight, which is tied to model.embed_tokens.weight.*trained on"):
        PeftModel.from_pretrained(make_model("llama-tied"), tmp_path)
    with pytest.warns(UserWarning, match="float32 base.*bfloat16"):
        PeftModel.from_pretrained(make_model("llama").bfloat16(), tmp_path)


@pytest.mark.parametrize(("there", "here"), [("llama", "llama-tied"), ("llama-tied", "llama")])
def test_a_delta_of_a_tensor_that_is_tied_on_one_base_only_is_refused_by_name(there, here, tmp_path):
    model = get_peft_model(make_model(there), GreenTrainerConfig())
    train_a_little(model, there, ["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.embed_tokens.weight is tied to .*trained on"):
        PeftModel.from_pretrained(make_model(here), tmp_path)


def test_an_adapter_that_was_never_selected_is_checked_too(tmp_path):
    get_peft_model(make_model("llama"), GreenTrainerConfig()).save_pretrained(tmp_path)
    other = make_model("llama")
    for parameter in other.parameters():
        parameter.data *= 1.5
    with pytest.raises(ValueError, match="made for another base"):
        PeftModel.from_pretrained(other, tmp_path)


def test_fingerprints_are_of_the_base_also_while_an_adapter_is_merged():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(init_weights=False))
    before = copy.deepcopy(model.peft_config["default"].tensors)
    model.merge_adapter()
    model.add_adapter("second", GreenTrainerConfig())
    assert model.peft_config["second"].tensors == before


# One config object, several uses


def test_a_config_that_was_used_starts_anew_on_another_model():
    config = GreenTrainerConfig(rho=0.5)
    first = get_peft_model(make_model("llama"), config)
    train_a_little(first, "llama", ["lm_head.weight"])
    for kind in ("llama", "bert"):
        model = get_peft_model(make_model(kind), config)
        assert model.peft_config["default"] is config and config.provisional and config.spent is None
        assert torch.equal(outputs(model, kind), outputs(make_model(kind), kind))


def test_a_config_is_shared_by_two_adapters_of_a_model(tmp_path):
    config = GreenTrainerConfig(rho=0.5)
    model = get_peft_model(make_model("llama"), config)
    model.add_adapter("second", config)
    base = model.get_base_model()
    for adapter, tensors in (("default", {"lm_head.weight"}), ("second", {"model.norm.weight"})):
        set_values(base, adapter, tensors)
        set_selection(base, adapter, tensors)
    assert list(model.peft_config["default"].tensors) == ["lm_head.weight"]
    assert list(model.peft_config["second"].tensors) == ["model.norm.weight"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["selected"] == ["model.norm.weight"]


# Compiled models


@pytest.mark.parametrize("compiled_there", [False, True])
@pytest.mark.parametrize("compiled_here", [False, True])
def test_a_delta_goes_between_plain_and_compiled_models(compiled_there, compiled_here, tmp_path):
    def base(compiled):
        return torch.compile(make_model("llama"), backend="eager") if compiled else make_model("llama")

    model = get_peft_model(base(compiled_there), GreenTrainerConfig())
    Loop(model).run(3)
    assert model.base_model.selection.ratio <= 0.5
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in model.peft_config["default"].tensors)
    loaded = PeftModel.from_pretrained(base(compiled_here), tmp_path)
    torch.testing.assert_close(outputs(loaded, "llama"), outputs(model, "llama"))
