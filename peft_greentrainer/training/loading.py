"""Loads state dicts of whole models: what depends on the set of values follows when a state changes it.

    >>> follow_loading(base)
    >>> model.load_state_dict(torch.load("checkpoint.pt"))     # values, config, and optimizers that exist already

The layers create and drop values by the keys that they are given. The base model hears of it, before and after.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.save_and_load import follow_layers
from ..adapter.state import EXTRA_STATE
from ..adapter.values import layers
from .param_groups import Placement, TrainedBy, keep_in_step


# For each base model that a state is being loaded into: its optimizers, with the groups and the values of each before.
_waiting: weakref.WeakKeyDictionary[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()


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
    if hasattr(model, "_greentrainer_allocator"):
        model._greentrainer_allocator.end()  # what it was going to measure may be gone
    before = _values(model)
    for optimizer in [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]:
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for adapter_name in {adapter for i, (_, adapter) in before.items() if i in members}:
            groups = Placement.of(TrainedBy([optimizer]), model, adapter_name).groups
            _waiting[model].append((optimizer, adapter_name, groups, before))


def _after_loading(model: nn.Module, _: Any) -> None:
    follow_layers(model)
    after = _values(model)
    for optimizer, adapter_name, groups, before in _waiting.pop(model):
        dropped = [value for i, (value, _) in before.items() if i not in after]
        keep_in_step([optimizer], model, groups, adapter_name, dropped)


def _values(model: nn.Module) -> dict[int, tuple[Tensor, str]]:
    """The values of all adapters by their identity, each with the name of its adapter."""
    return {
        id(value): (value, adapter)
        for layer in layers(model).values()
        for adapter, values in layer.greentrainer_values.items()
        for value in values.values()
    }
