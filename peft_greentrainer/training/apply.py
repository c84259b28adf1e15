"""Applies a selection: values, what requires grad, groups of optimizers, reducers of all ranks, and averages follow.

>>> placement = find_placement(OptimizerSetup([optimizer]), base_model, "default")
>>> apply_selection(base_model, "default", frozenset({"model.norm.weight"}), [optimizer], placement)
>>> [name for name, p in base_model.named_parameters() if p.requires_grad]
['model.norm.greentrainer_values.default.weight']
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import nn

from ..adapter.values import config_of, layers_with, set_selection, set_values
from .averaging import update_averages
from .parallel.ddp import rebuild_reducers
from .param_groups import keep_in_step
from .placement import Placement


def apply_selection(
    model: nn.Module,
    adapter_name: str,
    selected: Set[str],
    optimizers: Sequence[torch.optim.Optimizer],
    placement: Placement,
) -> None:
    """Train these candidates from now on, and no others.

    Args:
        model: the base model.
        adapter_name: the adapter that is trained.
        selected: candidates, tensors and low-rank forms, by their names in the base model.
        optimizers: those that train the model; they stay the same objects.
        placement: the group of each tensor.
    """
    config = config_of(model, adapter_name)
    before = _values(model, adapter_name)
    # What the provisional selection trained was a stand-in for the first steps: unless selected now, it is forgotten.
    kept = set() if config.provisional else set(config.tensors or ())
    set_values(model, adapter_name, selected | kept)
    set_selection(model, adapter_name, selected)
    after = {id(value) for value in _values(model, adapter_name)}
    dropped = [value for value in before if id(value) not in after]
    keep_in_step(optimizers, model, placement.groups, adapter_name, dropped)
    rebuild_reducers(model)
    update_averages(model)


def _values(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    wrappers = layers_with(model, adapter_name).values()
    return [value for layer in wrappers for value in layer.greentrainer_values[adapter_name].parameters()]
