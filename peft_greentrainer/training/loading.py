"""Loads state dicts of whole models: what depends on the set of values follows when a state changes it.

    >>> follow_loading(base)
    >>> model.load_state_dict(torch.load("checkpoint.pt"))     # values, config, and optimizers that exist already

The layers create and drop values by the keys that they are given. The base model hears of it, before and after. Optimizers do
not: torch has no way from a parameter to the optimizers that it is in, and whoever loads a state hands over none. So all
optimizers of the process are searched for those that have values of this model, once for each state that is loaded. What
holds it is tests/adapter/test_state.py::test_an_optimizer_that_was_made_before_loading_is_kept_in_step.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter.save_and_load import follow_layers
from ..adapter.state import EXTRA_STATE
from ..adapter.values import layers
from ..measuring.enclosing import instances
from .param_groups import Group, keep_in_step
from .placement import OptimizerSetup, find_placement


@dataclass(frozen=True)
class _Before:
    """An optimizer before a state is loaded.

    Attributes:
        groups: that of each tensor of the adapter which it trains.
        values: those that the model has.
    """

    optimizer: torch.optim.Optimizer
    adapter_name: str
    groups: dict[str, Group]
    values: list[nn.Parameter]


# For each base model that a state is being loaded into, its optimizers.
_waiting: weakref.WeakKeyDictionary[nn.Module, list[_Before]] = weakref.WeakKeyDictionary()


def follow_loading(model: nn.Module) -> None:
    """Let config and optimizers follow whatever is loaded into this base model. Doing so again is harmless."""
    if not is_followed(model):
        model.register_load_state_dict_pre_hook(_before_loading)
        model.register_load_state_dict_post_hook(_after_loading)


def is_followed(model: nn.Module) -> bool:
    return _after_loading in model._load_state_dict_post_hooks.values()


def stop_following(model: nn.Module) -> None:
    """Leave no trace of this package in a base model that has no wrappers any more."""
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key in [
            key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_before_loading, _after_loading)
        ]:
            del hooks[key]


def _before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _waiting[model] = []
    if not any(key.startswith(prefix) and key.endswith(f".{EXTRA_STATE}") for key in state_dict):
        return
    if "_greentrainer_allocator" in vars(model):
        vars(model)["_greentrainer_allocator"].end()  # what it was going to measure may be gone
    adapters = _adapters_of_values(model)
    values = [value for value, _ in adapters.values()]
    for optimizer in instances(torch.optim.Optimizer):
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for adapter_name in {adapter for i, (_, adapter) in adapters.items() if i in members}:
            groups = find_placement(OptimizerSetup([optimizer]), model, adapter_name).groups
            _waiting[model].append(_Before(optimizer, adapter_name, groups, values))


def _after_loading(model: nn.Module, _: Any) -> None:
    follow_layers(model)
    after = _adapters_of_values(model)
    for before in _waiting.pop(model):
        dropped = [value for value in before.values if id(value) not in after]
        keep_in_step([before.optimizer], model, before.groups, before.adapter_name, dropped)


def _adapters_of_values(model: nn.Module) -> dict[int, tuple[nn.Parameter, str]]:
    """The values of all adapters by their identity, each with the name of its adapter."""
    return {
        id(value): (value, adapter)
        for layer in layers(model).values()
        for adapter, values in layer.greentrainer_values.items()
        for value in values.parameters()
    }
