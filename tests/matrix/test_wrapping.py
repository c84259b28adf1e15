"""What wrapping leaves as it was: outputs, attributes, gradients; and what a trained value costs."""

import json

import pytest
import torch
from helpers.cases import TRAINED
from safetensors.torch import load_file
from torch import nn

from peft_greentrainer import GreenTrainerLayer, flop_counter, profile
from peft_greentrainer.adapter.values import candidates, layers


only_trained = pytest.mark.parametrize("case", TRAINED, indirect=True, ids=lambda case: case[0])


def owners(model):
    """The tensors that a wrapper of their own module can hold: modules with parameters whose children have none."""
    seen = {}
    for key, module in model.named_modules():
        nested = any(True for child in module.children() for _ in child.parameters())
        for name, parameter in module.named_parameters(recurse=False):
            if key and not nested:
                seen.setdefault(id(parameter), f"{key}.{name}")
    return sorted(seen.values())


def test_an_untrained_adapter_changes_nothing(case):
    model = case.untrained(init_weights=True)
    assert case.same(case.output(model), case.output(case.base()))
    trainable_parameters, total = model.get_nb_trainable_parameters()
    assert 0 < trainable_parameters < total


def test_wrapper_attributes_are_those_of_the_module(case):
    model, base = case.model(), case.base()
    for key, layer in layers(model).items():
        module = base.get_submodule(key)
        assert isinstance(layer, nn.LayerNorm) == isinstance(module, nn.LayerNorm)
        for name, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple)) and not name.startswith("_"):
                assert getattr(layer, name) == value
        assert hasattr(layer, "weight") == hasattr(module, "weight")
        assert hasattr(layer, "in_features") and hasattr(layer, "out_features")


def test_in_and_out_features_are_there(case):
    model, base = case.model(), case.base()
    for key, layer in layers(model).items():
        module = base.get_submodule(key)
        assert layer.in_features == getattr(module, "in_features", getattr(module, "nx", None))
        assert layer.out_features == getattr(module, "out_features", getattr(module, "nf", None))


@only_trained
def test_every_module_that_owns_parameters_has_candidates(case):
    model = case.untrained()
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert sorted(found) == owners(case.base())


@only_trained
def test_every_gradient_is_that_of_full_fine_tuning(case):
    # Whatever way a model reads its tensors: as a child's weight (Mamba, Qwen3-Next), from a tied module, by a method.
    base, model = case.base(), case.untrained(rho=1.0)
    for each in (base, model):
        each.eval()(**case.batch())["loss"].backward()
    expected = {name: p.grad for name, p in base.named_parameters(remove_duplicate=False)}
    found = layers(model)
    tensors = candidates(model.get_base_model(), model.peft_config["default"])
    for name in tensors:
        key, _, tensor = name.rpartition(".")
        assert torch.equal(found[key].greentrainer_values["default"][tensor].grad, expected[name]), name


@only_trained
def test_the_file_holds_the_changed_tensors_only(case, tmp_path):
    base, model = case.base(), case.model()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    changed = {
        f"{key}.{name}"
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, GreenTrainerLayer)
        for name in layer.greentrainer_values["default"]
        if not torch.equal(layer.effective_tensor(name), layer.base_tensor(name))
    }
    names = {k.removeprefix("base_model.model.").replace("greentrainer_values.", "") for k in file}
    unmoved = names - changed  # a key's bias has no gradient in a softmax, say
    assert changed <= names and len(unmoved) <= len(names) // 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "GREENTRAINER"
    assert set(config["tensors"]) == set(config["selected"]) == names
    base_tensors = dict(base.named_parameters(remove_duplicate=False))
    assert all(config["tensors"][name]["shape"] == list(base_tensors[name].shape) for name in names)


@only_trained
def test_forward_costs_no_flops_and_copies_no_weight(case):
    base, model = case.base(), case.model()
    with flop_counter() as of_base:
        base.eval()(**case.batch())
    with flop_counter() as of_wrapped:
        model.eval()(**case.batch())
    assert of_wrapped.get_total_flops() == of_base.get_total_flops()
    for layer in model.get_base_model().modules():
        if isinstance(layer, GreenTrainerLayer):
            for name, value in layer.greentrainer_values["default"].items():
                assert layer.effective_tensor(name) is value
                assert getattr(layer, name) is value


@only_trained
def test_a_step_costs_what_was_planned(case):
    base, model = case.base(), case.model()
    graph = profile(base.train(), case.batch())
    selected = [name for name in model.peft_config["default"].selected if name in graph.tensors]
    with flop_counter() as counter:
        case.loss(model).backward()
    assert counter.get_total_flops() == graph.flops(selected)
