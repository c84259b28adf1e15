"""The cases of the matrix: small models and configs, each of which makes adapters that change the output."""

import copy

import torch
from helpers.models import TASKS, make_batch, make_model
from helpers.training import train_a_little
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_greentrainer import GreenTrainerConfig


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 3)
        self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.last(self.lin1(torch.relu(self.norm(self.lin0(x))))).log_softmax(-1)


class EmbeddingConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 8)
        self.conv1d = Conv1D(6, 8)
        self.conv2d = nn.Conv2d(1, 4, 3, groups=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.conv2d(self.conv1d(self.emb(x))[:, None]).flatten(2).transpose(1, 2)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.recurrent(hidden)[0].mean(1))


PLAIN = {
    "mlp": (Mlp, {"x": torch.linspace(-1, 1, 60).view(6, 10)}),
    "many kinds": (EmbeddingConv1d, {"x": torch.arange(60).view(6, 10) % 50}),
}

# Half of the tensors have moved, by training; elsewhere all are moved at random.
TRAINED = [
    (kind, {"rho": 0.6, "init_weights": True})
    for kind in (
        "llama",
        "llama-tied",
        "gpt2",
        "opt",
        "bloom",
        "t5",
        "bert",
        "mixture",
        "mamba",
        "mamba2",
        "qwen3-next",
        "convnet",
    )
]
CASES = [
    ("mlp", {}),
    ("mlp", {"target_modules": ["lin0"]}),
    ("mlp", {"target_modules": ["lin0", "norm"], "rho": 0.6}),
    ("mlp", {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
    ("mlp", {"target_modules": "all-linear"}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("mlp", {"modules_to_save": ["last", "norm"]}),
    ("many kinds", {}),
    ("many kinds", {"target_modules": ["emb", "conv1d", "attention.out_proj"]}),
    ("many kinds", {"target_modules": ["conv2d", "recurrent"], "modules_to_save": ["head"]}),
    ("llama-tied", {}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("gpt2", {"exclude_modules": r".*(wte|lm_head)"}),
    ("t5", {}),
    *((kind, {}) for kind in TASKS),
    ("bert-sequences", {"target_modules": ["query", "value"]}),
    ("llama-sequences", {"layers_to_transform": 1}),
    ("mlp", {"low_rank": "also", "r": 2}),
    ("mlp", {"low_rank": "only", "target_modules": ["lin0", "norm"], "modules_to_save": ["last"]}),
    ("many kinds", {"low_rank": "also", "r": 2}),
    ("llama-tied", {"low_rank": "only", "r": 2}),
    ("gpt2", {"low_rank": "also", "r": 2}),
    ("t5", {"low_rank": "only", "r": 2}),
    ("bert-sequences", {"low_rank": "also", "r": 2, "target_modules": ["query", "value"]}),
    *TRAINED,
]


class Case:
    """A model and a config: makes adapters that change the output, and tells what it is."""

    def __init__(self, kind, options):
        self.kind = kind
        task = {"task_type": TASKS[kind][3]} if kind in TASKS else {}
        self.options = {"rho": 1.0, "init_weights": False} | task | options

    def base(self):
        torch.manual_seed(0)
        return PLAIN[self.kind][0]() if self.kind in PLAIN else make_model(self.kind)

    def config(self, **changes):
        return GreenTrainerConfig(**copy.deepcopy(self.options | changes))

    def untrained(self, adapters=("default",), **changes):
        model = get_peft_model(self.base(), self.config(**changes), adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, self.config(**changes))
        return model

    def model(self, adapters=("default",), **changes):
        model = self.untrained(adapters, **changes)
        if self.options["init_weights"]:
            for name in adapters:
                model.set_adapter(name)
                train_a_little(model, self.kind, adapter=name)
            model.set_adapter(adapters[0])
        return model

    def batch(self):
        return copy.copy(PLAIN[self.kind][1]) if self.kind in PLAIN else make_batch(self.kind)

    def output(self, model):
        with torch.no_grad():
            output = model.eval()(**self.batch())
        if isinstance(output, torch.Tensor):
            return output
        found = {name: value for name, value in output.items() if name != "loss" and torch.is_tensor(value)}
        return torch.cat([value.flatten() for value in found.values()])

    def same(self, output, expected):
        # Whether fused kernels run depends on what requires grad and on the class of a child.
        return torch.allclose(output, expected, rtol=0, atol=1e-6 if self.kind == "many kinds" else 0)

    def same_merged(self, output, expected):
        # As LoRA's: an update is rounded where it is added to the output, or to the weight.
        tolerance = 1e-4 if "low_rank" in self.options else 0
        return self.same(output, expected) or torch.allclose(output, expected, rtol=tolerance, atol=tolerance)

    def loss(self, model):
        output = model.train()(**self.batch())
        if isinstance(output, torch.Tensor):
            return output.square().mean()
        return output.last_hidden_state.square().mean() if output.get("loss") is None else output["loss"]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def moved(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)


def tied(model):
    """Names of parameters that are other names of one before."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names - dict(model.named_parameters()).keys()


def heads(model):
    return {name for name in trainable(model) if ".modules_to_save." in name}
