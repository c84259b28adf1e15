"""The candidates of an adapter are computed once, and are the same in whatever becomes of the model."""

import copy
import pickle
import sys

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_model
from peft import get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.adapter import model as tuner
from peft_greentrainer.adapter import values
from peft_greentrainer.adapter.candidates import ATTRIBUTE, candidates_of
from peft_greentrainer.adapter.state import Values
from peft_greentrainer.adapter.values import candidates, layers, set_selection, set_values


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("low_rank", [False, "also"])
def test_they_are_computed_once(low_rank, monkeypatch):
    computed, find = [], tuner.find_tensors

    def find_tensors(model):
        computed.append(model)
        return find(model)

    for module in (tuner, values):
        monkeypatch.setattr(module, "find_tensors", find_tensors)
    config = GreenTrainerConfig(rho=0.6, reselect=2, low_rank=low_rank)
    model = get_peft_model(make_model("llama"), config)
    loop = Loop(model, "llama", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)).run(7)
    assert loop.selection and len(computed) == 1


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_them(make_copy):
    model = get_peft_model(make_model("llama-tied"), GreenTrainerConfig())
    base, other = model.get_base_model(), make_copy(model).get_base_model()
    assert candidates_of(other, "default") == candidates_of(base, "default")
    set_values(other, "default", ["model.norm.weight"])
    assert (
        set(model.peft_config["default"].tensors) != {"model.norm.weight"} == set(other.peft_config["default"].tensors)
    )


def test_each_adapter_has_its_own_until_it_is_deleted():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(target_modules=["q_proj"]))
    model.add_adapter("other", GreenTrainerConfig(target_modules=["v_proj"], low_rank="also"))
    base = model.get_base_model()
    first, second = candidates_of(base, "default"), candidates_of(base, "other")
    assert all(name.endswith("q_proj.weight") for name in first.names)
    assert second.names[:2] == (
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.v_proj.weight_low_rank",
    )
    for name in ("default", "other"):
        assert candidates(base, model.peft_config[name]) == list(candidates_of(base, name).names)
    model.delete_adapter("default")
    assert candidates_of(base, "other") is second and list(getattr(base, ATTRIBUTE)) == ["other"]


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_an_unloaded_model_has_none(unload):
    base = make_model("llama")
    before = set(vars(base))
    unloaded = getattr(get_peft_model(base, GreenTrainerConfig()), unload)()
    assert unloaded is base and ATTRIBUTE not in vars(base) and set(vars(base)) - before <= {"_greentrainer_allocator"}


@pytest.mark.parametrize("before", [True, False])
def test_a_single_module_may_be_compiled(before):
    """`torch.compile` puts a module around it, whose name is no part of that of a tensor."""
    plain = Pair()
    if before:
        plain.second = torch.compile(plain.second, backend="eager")
    model = get_peft_model(plain, GreenTrainerConfig())
    if not before:
        plain.second = torch.compile(plain.second, backend="eager")
    base = model.get_base_model()
    assert list(layers(base)) == ["first", "second"]
    assert candidates(base, model.peft_config["default"]) == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]
    set_values(base, "default", ["second.weight"])
    set_selection(base, "default", ["second.weight"])
    model(torch.ones(2, 4)).sum().backward()
    (value,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert value is layers(base)["second"].greentrainer_values["default"]["weight"] and value.grad.any()


def test_all_linear_modules_of_a_compiled_model():
    def names(base):
        model = get_peft_model(base, GreenTrainerConfig(target_modules="all-linear"))
        return candidates(model.get_base_model(), model.peft_config["default"])

    # peft leaves the head out where it sees a transformers model, which the compiled one is not.
    compiled = names(torch.compile(make_model("llama"), backend="eager"))
    assert compiled == [*names(make_model("llama")), "lm_head.weight"]


@pytest.mark.parametrize("low_rank", [False, "also"])
def test_one_place_writes_the_selection(low_rank, monkeypatch, tmp_path):
    """While an adapter is trained, saved and loaded into: the layers' values have it, and one function derives the config."""
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, low_rank=low_rank, r=2, reselect=2))
    writers = set()

    def watched(cls, names):
        write = cls.__setattr__

        def noting(self, name, value):
            if name in names:
                writers.add(f"{cls.__name__}.{name} in {sys._getframe(1).f_code.co_name}")
            write(self, name, value)

        monkeypatch.setattr(cls, "__setattr__", noting)

    watched(GreenTrainerConfig, ("selected", "tensors", "provisional"))
    watched(Values, ("selected_candidates", "is_provisional"))
    Loop(model).run(5)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.load_state_dict(model.state_dict())
    # Fingerprints are forgotten where the base tensors may have been loaded too.
    assert writers - {"GreenTrainerConfig.tensors in follow_layers"} == {
        "GreenTrainerConfig.selected in follow_selection",
        "GreenTrainerConfig.tensors in follow_selection",
        "GreenTrainerConfig.provisional in follow_selection",
        "Values.selected_candidates in note_selected",
        "Values.is_provisional in note_selected",
    }
