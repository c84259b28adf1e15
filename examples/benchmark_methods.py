"""The methods of `benchmark.py`: which parameters of a model they train, and learning rates to try first.

    >>> model = build("lora-last-15", base, task, batch)
    >>> learning_rates("lora-last-15")
    [0.001, 0.002, 0.004]

A name may end in a number: blocks, counted from the last, or rho.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_greentrainer import GreenTrainerConfig, profile, select


def full(model: nn.Module, **kwargs: Any) -> nn.Module:
    return model


def freeze(model: nn.Module, number: float, **kwargs: Any) -> nn.Module:
    """Train the last blocks and what comes after them."""
    first = model.config.num_hidden_layers - number
    for name, parameter in model.named_parameters():
        block = re.search(r"\.(\d+)\.", name)
        before = "embed" in name or (block and int(block[1]) < first)
        parameter.requires_grad_(not before)
    return model


def random_tensors(model: nn.Module, number: float, batch: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    """GreenTrainer's selection with importances drawn at random."""
    graph = profile(model.train(), batch)
    importance = dict(zip(graph.tensors, torch.rand(len(graph.tensors)).tolist()))
    heads = [name for name in graph.tensors if name.startswith("classifier.")]
    selection = select(graph, importance, number, always=heads)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selection.tensors)
    return model


def lora(model: nn.Module, task: Any, **kwargs: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task.task_type))


def lora_last(model: nn.Module, number: float, task: Any, **kwargs: Any) -> nn.Module:
    blocks = model.config.num_hidden_layers
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=task.linear_modules,
        layers_to_transform=list(range(blocks - int(number), blocks)),
        task_type=task.task_type,
    )
    return get_peft_model(model, config)


def greentrainer(model: nn.Module, number: float, task: Any, **kwargs: Any) -> nn.Module:
    return get_peft_model(model, GreenTrainerConfig(rho=number, task_type=task.task_type))


def low_rank(model: nn.Module, number: float, task: Any, **kwargs: Any) -> nn.Module:
    return get_peft_model(model, GreenTrainerConfig(rho=number, low_rank="only", task_type=task.task_type))


def both(model: nn.Module, number: float, task: Any, **kwargs: Any) -> nn.Module:
    return get_peft_model(model, GreenTrainerConfig(rho=number, low_rank=8, task_type=task.task_type))


class Method(NamedTuple):
    build: Callable[..., nn.Module]
    learning_rates: list[float]


METHODS = {
    "full": Method(full, [1e-4, 2e-4, 4e-4]),
    "freeze": Method(freeze, [2e-4, 4e-4, 8e-4]),
    "random": Method(random_tensors, [2e-4, 4e-4, 8e-4]),
    "lora": Method(lora, [1e-3, 2e-3, 4e-3]),
    "lora-last": Method(lora_last, [1e-3, 2e-3, 4e-3]),
    "greentrainer": Method(greentrainer, [2e-4, 4e-4, 8e-4]),
    "low-rank": Method(low_rank, [1e-4, 2e-4, 4e-4]),
    "both": Method(both, [1e-4, 2e-4, 4e-4]),
}


def build(name: str, model: nn.Module, task: Any, batch: dict[str, Tensor]) -> nn.Module:
    """The model with the parameters of a method set to be trained; `batch` is one to measure on."""
    kind, number = split(name)
    return METHODS[kind].build(model, number=number, task=task, batch=batch)


def learning_rates(name: str) -> list[float]:
    return METHODS[split(name)[0]].learning_rates


def split(name: str) -> tuple[str, float | None]:
    """
    >>> split("lora-last-15"), split("lora")
    (('lora-last', 15.0), ('lora', None))
    """
    kind, number = re.fullmatch(r"(.+?)(?:-([\d.]+))?", name).groups()
    return kind, number and float(number)
