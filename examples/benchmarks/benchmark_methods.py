"""The methods of `benchmark.py`: which parameters of a model they train, and learning rates to try first.

    >>> model = build("lora-last-15", base, task, batches, lr=2e-3)
    >>> learning_rates("lora-last-15")
    [0.001, 0.002, 0.004]

A name may end in a number: blocks, counted from the last, or rho.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmark_importance import METRICS
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


def selected(
    model: nn.Module, number: float, batches: Iterator[dict[str, Tensor]], lr: float, metric: str, **kwargs: Any
) -> nn.Module:
    """Select once, before training, by some importance; what that measures is paid for."""
    model.train()
    importance = METRICS[metric](model, batches, lr)
    graph = profile(model, next(batches))
    # Where batches disagree an importance is negative: the least there is.
    importance = {name: max(importance[name], 0.0) for name in graph.tensors}
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


def greentrainer(model: nn.Module, number: float, task: Any, options: dict[str, Any], **kwargs: Any) -> nn.Module:
    return get_peft_model(model, GreenTrainerConfig(rho=number, task_type=task.task_type, **options))


class Method(NamedTuple):
    build: Callable[..., nn.Module]
    learning_rates: list[float]


METHODS = {
    "full": Method(full, [1e-4, 2e-4, 4e-4]),
    "freeze": Method(freeze, [2e-4, 4e-4, 8e-4]),
    **{metric: Method(partial(selected, metric=metric), [2e-4, 4e-4, 8e-4]) for metric in METRICS},
    "lora": Method(lora, [1e-3, 2e-3, 4e-3]),
    "lora-last": Method(lora_last, [1e-3, 2e-3, 4e-3]),
    "greentrainer": Method(partial(greentrainer, options={}), [2e-4, 4e-4, 8e-4]),
    "greentrainer-every-epoch": Method(partial(greentrainer, options={"reselect": "epoch"}), [2e-4, 4e-4, 8e-4]),
    "greentrainer-every-20": Method(partial(greentrainer, options={"reselect": 20}), [2e-4, 4e-4, 8e-4]),
    "low-rank": Method(partial(greentrainer, options={"low_rank": "only"}), [1e-4, 2e-4, 4e-4]),
    "both": Method(partial(greentrainer, options={"low_rank": "also", "r": 8}), [1e-4, 2e-4, 4e-4]),
}


def build(name: str, model: nn.Module, task: Any, batches: Iterator[dict[str, Tensor]], lr: float) -> nn.Module:
    """The model with the parameters of a method set to be trained; `batches` are to measure on."""
    kind, number = split(name)
    return METHODS[kind].build(model, number=number, task=task, batches=batches, lr=lr)


def learning_rates(name: str) -> list[float]:
    return METHODS[split(name)[0]].learning_rates


def split(name: str) -> tuple[str, float | None]:
    """
    >>> split("lora-last-15"), split("lora")
    (('lora-last', 15.0), ('lora', None))
    """
    kind, number = re.fullmatch(r"(.+?)(?:-([\d.]+))?", name).groups()
    return kind, number and float(number)
