"""A wrapper is its module: to who asks for its class, and to who sets something on it."""

import copy
import io
import pickle

import pytest
import torch
from helpers.models import MODELS, PLAIN, VARIANTS, make_batch, make_model
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer
from peft_greentrainer.adapter.values import candidates, layers


def wrapped(base, **options):
    return get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0, **options))


def passes(model, kind, steps=2):
    """Outputs of some passes in training mode, with the gradients left where they are."""
    model.train()
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        output = model(**make_batch(kind, seed=step))
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
        found.append({k: v.detach().clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
    return found


def state(module):
    """What a module keeps beside its parameters and children: buffers, tensors and plain values."""
    kept = {f"buffer {name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    plain = (torch.Tensor, int, float, str, bool, tuple, type(None))
    return kept | {n: v for n, v in vars(module).items() if isinstance(v, plain) and n != "_is_hf_initialized"}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", [kind for kind in [*MODELS, *VARIANTS, *PLAIN] if kind != "lora"])
def test_with_nothing_trained_outputs_gradients_and_state_are_those_of_the_base(kind):
    base = make_model(kind).requires_grad_(True)  # Whisper's positions are frozen by itself
    model = wrapped(base)
    expected, found = passes(base, kind), passes(model, kind)
    for plain, adapted in zip(expected, found):
        assert plain.keys() == adapted.keys() and all(torch.equal(plain[name], adapted[name]) for name in plain)
    gradients = {name: p.grad for name, p in base.named_parameters(remove_duplicate=False)}
    wrappers = layers(model)
    for name in candidates(model.get_base_model(), model.peft_config["default"]):
        key, _, tensor = name.rpartition(".")
        gradient = wrappers[key].greentrainer_values["default"][tensor].grad
        assert (gradient is None) == (gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[name]), name
    for key, module in base.named_modules():
        there = model.get_base_model().get_submodule(key)
        there = there.base_layer if isinstance(there, GreenTrainerLayer) else there
        expected, found = state(module), state(there)
        assert expected.keys() == found.keys(), key
        assert all(same(expected[name], found[name]) for name in expected), key
    if kind == "recurrent-gemma":  # or the test above tests nothing
        assert "recurrent_states" in state(base.model.layers[0].temporal_block.rg_lru)


@pytest.mark.parametrize("kind", [*MODELS, *PLAIN])
def test_a_wrapper_is_an_instance_of_its_modules_class(kind):
    base = make_model(kind)
    model = wrapped(base).get_base_model()
    seen = 0
    for key, module in base.named_modules():
        there = model.get_submodule(key)
        assert isinstance(there, type(module)), key
        for cls in type(module).__mro__:
            assert isinstance(there, cls)
        seen += isinstance(there, GreenTrainerLayer)
    assert seen


# State


class Scaled(nn.Module):
    """A leaf whose parent sets what it does, and which keeps a state that its parent resets."""

    default_temperature = 2.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.temperature = 1.0
        self.state = None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        hidden = x @ self.weight / self.temperature
        if self.training:
            hidden = hidden * 3
        if self.state is not None:
            hidden = hidden + self.state
        self.state = hidden
        self.seen = self.seen + 1
        return hidden

    def scaled_by(self, factor):
        self.temperature = factor
        return self


class Parent(nn.Module):
    def __init__(self, act=lambda leaf: None):
        super().__init__()
        self.leaf = Scaled()
        self.act = act

    def forward(self, x):
        self.act(self.leaf)
        self.leaf.state = None
        return self.leaf(x)


def set_temperature(leaf):
    leaf.temperature = 0.5


def stop_training(leaf):
    leaf.training = False


def replace_buffer(leaf):
    leaf.seen = torch.full((), 7.0)


def register(leaf):
    leaf.register_buffer("mask", torch.ones(4), persistent=False)
    leaf.temperature = 2.0 if hasattr(leaf, "mask") else 1.0


def forget_and_set(leaf):
    del leaf.temperature
    leaf.temperature = 4.0 if not hasattr(leaf, "temperature") else 1.0


def call_a_method(leaf):
    leaf.scaled_by(0.25)


def by_setattr(leaf):
    setattr(leaf, "temperature", leaf.default_temperature)


def replace_weight(leaf):
    leaf.weight.data = torch.eye(4)


def new_submodule(leaf):
    leaf.dropout = nn.Dropout(0.0)
    leaf.temperature = 1.0 + isinstance(leaf.dropout, nn.Dropout)


@pytest.mark.parametrize(
    "act",
    [
        set_temperature,
        stop_training,
        replace_buffer,
        register,
        forget_and_set,
        call_a_method,
        by_setattr,
        replace_weight,
        new_submodule,
    ],
)
def test_what_a_parent_does_to_a_leaf_reaches_it(act):
    torch.manual_seed(0)
    base = Parent(act)
    model = wrapped(base)
    assert isinstance(model.get_base_model().leaf, GreenTrainerLayer)
    x = torch.randn(2, 4)
    for _ in range(2):  # in the second step a state that was not reset would have a graph that is gone
        outputs = [each(x) for each in (base, model)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.sum().backward()
    leaf = model.get_base_model().leaf
    kept = {n: v for n, v in vars(leaf.base_layer).items() if not n.startswith("_")}
    assert kept.keys() == {n for n in vars(base.leaf) if not n.startswith("_")}
    assert leaf.training == base.leaf.training and leaf.temperature == base.leaf.temperature
    assert torch.equal(leaf.seen, base.leaf.seen)


def test_training_mode_is_that_of_the_module_which_may_not_follow():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    base = nn.Sequential(nn.Linear(4, 4), Frozen(4)).train()
    model = wrapped(base).train()
    norm = model.get_base_model()[1]
    assert isinstance(norm, GreenTrainerLayer) and not norm.training and not norm.base_layer.training
    assert torch.equal(model(torch.ones(2, 4)), base(torch.ones(2, 4)))


def test_an_embedding_that_the_model_gives_is_one():
    model = wrapped(make_model("llama"))
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert not isinstance(model.get_output_embeddings(), GreenTrainerLayer)
    model.get_input_embeddings().temperature = 3
    assert model.get_base_model().model.embed_tokens.base_layer.temperature == 3


# Who looks at all modules


class Noisy(nn.Module):
    """A leaf of which the loss of the model is made, as in Bayesian layers and in routers of experts."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(4, 4))
        self.dropout = nn.Dropout(0.0)
        self.calls = 0

    def penalty(self):
        self.calls += 1
        return self.mean.square().sum() * self.calls

    def forward(self, hidden):
        self.balance = self.dropout(hidden @ self.mean).mean()
        return hidden @ self.mean


class Collecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Noisy(), nn.LayerNorm(4), Noisy()])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        noisy = [module for module in self.modules() if isinstance(module, Noisy)]
        for module in self.modules():
            if isinstance(module, (Noisy, nn.Dropout)):
                module.marked = getattr(module, "marked", 0) + 1
        penalty = sum(module.penalty() + module.balance for module in noisy) / len(noisy)
        return {"loss": hidden.square().mean() + penalty, "logits": hidden}


def test_each_module_is_found_once_among_all():
    torch.manual_seed(0)
    base = Collecting()
    model = wrapped(base)
    for _ in range(2):
        hidden = torch.randn(2, 4)
        expected, found = base(hidden), model(hidden)
        assert torch.equal(expected["loss"], found["loss"]) and torch.equal(expected["logits"], found["logits"])
        expected["loss"].backward()
        found["loss"].backward()
    for name, layer in layers(model).items():
        for tensor, value in layer.greentrainer_values["default"].items():
            assert torch.equal(value.grad, base.get_submodule(name).get_parameter(tensor).grad)
        if isinstance(layer, Noisy):
            assert layer.calls == layer.marked == layer.dropout.marked == 2
    names = {name for name, _ in base.named_parameters()}
    inside = {name.replace(".base_layer", "") for name, _ in model.get_base_model().named_parameters()}
    assert names <= inside and [id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters()]


def test_what_is_put_on_a_module_that_was_found_among_all_is_on_the_module():
    model = wrapped(make_model("llama"))
    calls = []
    for module in model.modules():
        module.seen = True
        module.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    model(**make_batch("llama"))
    assert all(layer.base_layer.seen and layer.seen for layer in layers(model).values())
    assert calls.count(nn.Linear) == sum(isinstance(m, nn.Linear) for m in make_model("llama").modules())
    copied = copy.deepcopy(model)
    for _, module in copied.named_modules():
        module.seen = False
    assert all(layer.base_layer.seen for layer in layers(model).values())
    assert not any(layer.base_layer.seen for layer in layers(copied).values())


# Classes of all kinds


class Registered(nn.Module):
    """A class that keeps a register of its subclasses, and wants to be told."""

    known = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class OfItsOwnKind(type(Registered)):
    pass


class WithMeta(nn.Module, metaclass=OfItsOwnKind):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class Sized(nn.Module):
    """Special methods, which Python looks for in the class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def __len__(self):
        return len(self.weight)

    def __contains__(self, item):
        return item == "weight"

    def __new__(cls, *args):
        return super().__new__(cls)

    def __deepcopy__(self, memo):
        return Sized()

    def forward(self, x):
        return x * self.weight / len(self)


class Reset(nn.LSTM):
    """Its own `__setattr__`, `_apply` and `__setstate__`."""


@pytest.mark.parametrize("make", [Registered, WithMeta, Sized, lambda: Reset(4, 4), lambda: nn.GRUCell(4, 4)])
def test_classes_of_all_kinds_are_wrapped_copied_and_pickled(make):
    base = nn.ModuleDict({"leaf": make()})
    known = list(Registered.known)
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0))
    leaf = model.get_base_model()["leaf"]
    assert isinstance(leaf, GreenTrainerLayer) and isinstance(leaf, type(leaf.base_layer))
    assert Registered.known == known
    x = torch.randn(2, 4)
    pickled = io.BytesIO()
    torch.save(leaf, pickled)
    pickled.seek(0)
    for same_leaf in (
        copy.deepcopy(leaf),
        pickle.loads(pickle.dumps(leaf)),
        torch.load(pickled, weights_only=False),
    ):
        assert type(same_leaf) is type(leaf) and same_leaf is not leaf
        found, expected = same_leaf(x), leaf(x)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        assert torch.equal(found, expected)
    if isinstance(leaf, Sized):
        assert len(leaf) == 4 and "weight" in leaf


def test_the_class_of_a_wrapper_can_be_swapped():
    # As fully_shard does it.
    model = wrapped(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    linear = model.get_base_model()[0]

    class Sharded:
        def unshard(self):
            return "unsharded"

    before = linear(torch.ones(1, 4))
    linear.__class__ = type("ShardedLinear", (Sharded, type(linear)), {})
    assert linear.unshard() == "unsharded" and isinstance(linear, (GreenTrainerLayer, nn.Linear))
    linear.temperature = 3
    assert linear.base_layer.temperature == 3
    assert torch.equal(linear(torch.ones(1, 4)), before)


@pytest.mark.parametrize("where", ["before", "after"])
def test_the_hooks_of_accelerate_are_put_on_and_taken_off(where):
    from accelerate.hooks import attach_execution_device_hook, remove_hook_from_submodules

    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    if where == "before":
        attach_execution_device_hook(base, "cpu")
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0, init_weights=False))
    x = torch.ones(1, 4)
    expected = model(x)
    if where == "after":
        attach_execution_device_hook(model, "cpu")
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(base if where == "before" else model)
    assert torch.equal(model(x), expected)
    assert not any("_hf_hook" in vars(module) for module in model.modules())


def test_a_compiled_wrapper_sees_what_its_parent_sets():
    torch.manual_seed(0)
    base = Parent(set_temperature).eval()
    model = wrapped(base).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), base(x))


def test_lora_does_the_same_on_modules_that_it_does_not_target():
    # The right value of the tests above: LoRA leaves such a leaf alone.
    torch.manual_seed(0)
    base = nn.ModuleDict({"parent": Parent(set_temperature), "linear": nn.Linear(4, 4)})
    plain = copy.deepcopy(base)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["linear"])).get_base_model()
    ours = get_peft_model(copy.deepcopy(base), GreenTrainerConfig()).get_base_model()
    x = torch.randn(2, 4)
    for model in (lora, ours):
        assert torch.equal(model["parent"](x), plain["parent"](x))
        plain["parent"].leaf.seen.zero_()
