"""Modules of all sorts in a wrapped model: read by their parents, used by methods, items and threads."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from helpers.models import make_batch, make_model
from peft import get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer
from peft_greentrainer.adapter.values import candidates, set_selection, set_values


def test_code_that_reads_a_childs_weight_trains_it():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = nn.functional.linear(x, self.inner.weight, self.inner.bias)
            return self.attention(x, x, x)[0]

    model = get_peft_model(Reader(), GreenTrainerConfig())
    base = model.get_base_model()
    tensors = sorted(candidates(base, model.peft_config["default"]))
    assert tensors == ["attention.out_proj.bias", "attention.out_proj.weight", "inner.bias", "inner.weight"]
    set_values(base, "default", tensors)
    set_selection(base, "default", tensors)
    model(torch.randn(2, 3, 4)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_a_module_with_two_parents_is_wrapped_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4))
            self.second = nn.ModuleDict({"same": self.first[0]})

        def forward(self, x):
            return self.second["same"](self.first(x))

    model = get_peft_model(Twice(), GreenTrainerConfig()).get_base_model()
    assert isinstance(model.first[0], GreenTrainerLayer) and model.second["same"] is model.first[0]


class Codebook(nn.Module):
    """Used by another method than forward, and beside containers of parameters and an empty one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def decode(self, hidden):
        return hidden @ self.weight.T


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = Codebook()
        self.inner = nn.Linear(4, 4)
        self.none = nn.Linear(4, 0)
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(4)})

    def forward(self, x):
        for scale in self.scales:
            x = x * scale + self.shifts["a"]
        return self.codebook.decode(self.inner(x))


def test_methods_other_than_forward_use_effective_tensors():
    base = Decoder()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    assert candidates(model.get_base_model(), model.peft_config["default"]) == [
        "codebook.weight",
        "inner.weight",
        "inner.bias",
    ]
    x = torch.randn(3, 4)
    assert torch.equal(model(x), base(x))
    values = model.get_base_model().codebook.greentrainer_values["default"]
    model(x).sum().backward()
    assert values["weight"].grad is not None
    values["weight"].data += 1
    after = model(x)
    assert not torch.equal(after, base(x))
    assert torch.equal(model.merge_and_unload()(x), after)


class Memory(nn.Module):
    """Tensors under names of a dictionary, a property made of a tensor, items."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(4, 4))
        self.log_scale = nn.Parameter(torch.zeros(4))

    @property
    def scale(self):
        return self.log_scale.exp()

    def forward(self, x):
        return x @ self.keys


class Shelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.rows[index]


class Library(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory, self.shelf, self.linear = Memory(), Shelf(), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.memory(x) * self.memory.scale + sum(self.shelf[i] for i in range(len(self.shelf))))


def test_unusual_modules_run_and_a_property_is_made_of_effective_tensors():
    base = Library()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert found == ["memory.keys", "memory.log_scale", "linear.weight", "linear.bias"]
    x = torch.randn(2, 4)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    value = model.get_base_model().memory.greentrainer_values["default"]["log_scale"]
    assert value.grad.any()
    value.data += 1
    assert torch.equal(model.get_base_model().memory.scale, value.exp())


def test_threads_that_share_a_model_leave_the_base_alone():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=1.0, init_weights=False)).eval()
    base = {name: p.clone() for name, p in model.named_parameters()}
    batch, interval = make_batch("llama", rows=1, tokens=4), sys.getswitchinterval()
    with torch.no_grad():
        expected = model(**batch).logits

        def run(_):
            with torch.no_grad():
                return all(torch.equal(model(**batch).logits, expected) for _ in range(10))

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(run, range(8)))
        finally:
            sys.setswitchinterval(interval)
    assert all(p is not None and torch.equal(p, base[name]) for name, p in model.named_parameters())
