"""Names come from where a wrapper stands, whatever modules and tensors are called."""

import copy
import warnings

import pytest
import torch
from helpers.models import make_batch, make_model
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from peft_greentrainer import (
    GreenTrainerConfig,
    GreenTrainerLayer,
    convert_to_lora,
    export_tensors,
    flop_counter,
    profile,
    select,
)
from peft_greentrainer.adapter.values import candidates, layers
from peft_greentrainer.training.allocator import allocator_of


class Reward(nn.Module):
    """A base whose attributes are called as those of a `PeftModel`."""

    def __init__(self):
        super().__init__()
        self.base_model = make_model("llama")
        self.value = nn.Linear(96, 1)

    def forward(self, **batch):
        logits = self.base_model(**batch).logits
        return {"loss": self.value(logits).mean() ** 2, "logits": logits}


class Nested(nn.Module):
    """Two paths, one of which is the other with the prefix of a `PeftModel` before it."""

    def __init__(self):
        super().__init__()
        self.x = nn.Linear(4, 4)
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)})})

    def forward(self, hidden):
        inner = self.base_model["model"]
        logits = inner["y"](inner["x"](self.x(hidden)).relu())
        return {"loss": logits.square().mean(), "logits": logits}


class Kept(nn.Module):
    """Attributes called as what peft and this package put into a model."""

    def __init__(self):
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 4)})
        self.base_layer = nn.Linear(4, 4)
        self.default = nn.Linear(4, 4)
        self.model = nn.ModuleDict({"base_layer": nn.ModuleDict({"base_layer": nn.Linear(4, 4)})})
        self.weight = nn.Linear(4, 4)
        self._orig = nn.Linear(4, 4)

    def forward(self, hidden):
        hidden = self.modules_to_save["default"](hidden).relu()
        hidden = self.default(self.base_layer(hidden).relu())
        logits = self._orig(self.weight(self.model["base_layer"]["base_layer"](hidden)).relu())
        return {"loss": logits.square().mean(), "logits": logits}


NAMES = ["keys", "values", "copy", "update", "pop", "items", "in_features", "out_features", "get", "clear", "T", "nx"]


class Named(nn.Module):
    """Parameters called as methods of dictionaries and as attributes of linear layers."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4) / 2))

    def forward(self, hidden):
        for name in NAMES:
            hidden = (hidden @ getattr(self, name)).tanh()
        return hidden


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf = Named()
        self.head = nn.Linear(4, 4)

    def forward(self, hidden):
        logits = self.head(self.leaf(hidden) @ self.leaf.keys @ self.leaf.in_features)
        return {"loss": logits.square().mean(), "logits": logits}


def batch_of(base, seed=0):
    torch.manual_seed(seed)
    return make_batch("llama", seed=seed) if isinstance(base, Reward) else {"hidden": torch.randn(8, 4)}


def run(model, base, steps=4, start=0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(start, start + steps):
        model(**batch_of(base, step))["loss"].backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()


def logits(model, base):
    with torch.no_grad():
        return model.eval()(**batch_of(base))["logits"]


@pytest.mark.parametrize("low_rank", [False, "also", "only"])
@pytest.mark.parametrize("make", [Reward, Nested, Kept, Leaves])
def test_what_was_trained_is_saved_loaded_merged_and_exported(make, low_rank, tmp_path):
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.8, low_rank=low_rank, r=2))
    run(model, base)
    model.save_pretrained(tmp_path)
    after = logits(model, base)
    assert not torch.equal(after, logits(copy.deepcopy(base), base))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, base), after)
    patched = copy.deepcopy(base)
    patched.load_state_dict(export_tensors(model), strict=False)
    torch.testing.assert_close(logits(patched, base), after)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    run(again, base, start=4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, base), after)
    if make is not Kept:  # unloading, peft takes whatever has a `base_layer` for a layer of its own, with LoRA too
        torch.testing.assert_close(logits(loaded.merge_and_unload(), base), after)


@pytest.mark.parametrize("make", [Reward, Nested, Kept, Leaves])
def test_every_tensor_of_a_leaf_is_a_candidate_by_its_name_in_the_base(make):
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert sorted(found) == sorted(name for name, _ in base.named_parameters())
    run(model, base)
    assert model.base_model.selection.tensors == set(found)
    for each in (base, model):
        each.zero_grad()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    for each in (base, model):
        each.train()(**batch_of(base))["loss"].backward()
    gradients = {name: p.grad for name, p in base.named_parameters()}
    wrappers = layers(model)
    for name in found:
        key, _, tensor = name.rpartition(".")
        assert torch.equal(wrappers[key].greentrainer_values["default"][tensor].grad, gradients[name]), name


@pytest.mark.parametrize("make", [Reward, Nested, Kept, Leaves])
def test_planned_is_counted(make):
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.8))
    run(model, base)
    with flop_counter() as counter:
        model.train()(**batch_of(base))["loss"].backward()
    with flop_counter() as full:
        base.train()(**batch_of(base))["loss"].backward()
    assert counter.get_total_flops() == model.base_model.selection.ratio * full.get_total_flops()
    measured = allocator_of(model.get_base_model()).graph.tensors
    assert sorted(measured) == sorted(name for name, _ in base.named_parameters())


@pytest.mark.parametrize("make", [Nested, Kept, Leaves])
def test_states_without_the_prefix_of_a_peft_model(make):
    torch.manual_seed(0)
    base = make()
    config = GreenTrainerConfig(rho=1.0, init_weights=False)
    model = inject_adapter_in_model(config, copy.deepcopy(base))
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(GreenTrainerConfig(rho=1.0), copy.deepcopy(base), state_dict=state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other, base), logits(model, base))


def test_lora_layers_of_the_base_are_candidates():
    lora = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj"])).base_model.model
    config = GreenTrainerConfig(rho=0.9)
    model = inject_adapter_in_model(config, lora, adapter_name="second")
    found = candidates(model, config)
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in found
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in found


def test_a_converted_delta_has_the_names_that_lora_loads():
    torch.manual_seed(0)
    base = Nested()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0, init_weights=False))
    for layer in layers(model).values():
        layer.greentrainer_values["default"]["bias"].data.copy_(layer.base_layer.bias)
    config, state, _ = convert_to_lora(model, rank=4)
    lora = get_peft_model(copy.deepcopy(base), config)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    torch.testing.assert_close(logits(lora, base), logits(model, base))


# What cannot be wrapped, for what it is called


class Merging(nn.Module):
    """A leaf with a method that a wrapper has too, and a parent that calls it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def merge(self, hidden):
        return hidden @ self.weight

    forward = merge


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.merged = nn.Parameter(torch.randn(4, 4))

    def forward(self, hidden):
        return hidden @ self.merged


class Factors(nn.Module):
    """Parameters called as the factors of a low-rank update."""

    def __init__(self):
        super().__init__()
        self.weight_low_rank_A = nn.Parameter(torch.randn(4, 2))
        self.weight_low_rank_B = nn.Parameter(torch.randn(2, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, hidden):
        return hidden @ self.weight_low_rank_A @ self.weight_low_rank_B + self.bias


@pytest.mark.parametrize(
    ("make", "named"),
    [(Merging, "leaf.weight"), (Flagged, "leaf.merged"), (Factors, "leaf.weight_low_rank_A")],
)
def test_what_cannot_be_trained_for_its_name_is_said(make, named):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = make()
            self.head = nn.Linear(4, 4)

        def forward(self, hidden):
            hidden = self.leaf.merge(hidden) if make is Merging else self.leaf(hidden)
            logits = self.head(hidden)
            return {"loss": logits.square().mean(), "logits": logits}

    torch.manual_seed(0)
    base = Parent()
    with pytest.warns(UserWarning, match=named.replace(".", r"\.")):
        model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    assert torch.equal(logits(model, base), logits(base, base))
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert named not in found and "head.weight" in found
    run(model, base)
    assert model.base_model.selection.tensors == set(found)


def test_nothing_is_said_where_every_name_will_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make_model("bert"), GreenTrainerConfig())


def test_a_plan_without_peft_has_any_name():
    torch.manual_seed(0)
    base = Leaves()
    graph = profile(base, {"hidden": torch.randn(8, 4)})
    selection = select(graph, dict.fromkeys(graph.tensors, 1.0), rho=0.9)
    assert selection.tensors <= {name for name, _ in base.named_parameters()} and selection.tensors
    assert not any(isinstance(module, GreenTrainerLayer) for module in base.modules())
