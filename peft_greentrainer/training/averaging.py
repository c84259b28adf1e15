"""Averages of a model that is being trained: `torch.optim.swa_utils.AveragedModel`, and whatever is built on it.

    >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> average.update_parameters(model)              # has the same values as the model, by name

It pairs the parameters of the model and of its own copy by position. Here their set changes with the selection: then an
average of a value would be written over another tensor, of the base model even.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..adapter.layer import GreenTrainerLayer
from ..adapter.save_and_load import follow_layers
from ..adapter.values import layers
from .loading import is_followed


# For each average, the model that it is made of.
_averaged: weakref.WeakKeyDictionary[AveragedModel, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def follow_selections() -> None:
    """Let every `AveragedModel` follow the changing sets of values, in place of what an earlier import did.

    This replaces two methods of torch's class, for a reason: users and Lightning call them on objects of that very class,
    which has no hook, and an average that pairs by position is wrong in silence. Of models without the adapter it makes what
    torch makes. What holds it is
    tests/training/test_averaging.py::test_other_models_are_averaged_as_ever_and_importing_again_changes_nothing.
    """
    make = getattr(AveragedModel.__init__, "original", AveragedModel.__init__)
    update = getattr(AveragedModel.update_parameters, "original", AveragedModel.update_parameters)

    @functools.wraps(make)
    def __init__(self: AveragedModel, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        make(self, model, *args, **kwargs)
        _averaged[self] = weakref.ref(model)

    @functools.wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        if not any(isinstance(module, GreenTrainerLayer) for module in model.modules()):
            update(self, model)
            return
        _averaged[self] = weakref.ref(model)  # copies of an average were not made from it
        have_same_values(self.module, model)
        if self.n_averaged == 0:
            update(self, model)
            return
        average = self.module
        self.module, of_model = _what_changes(average, model)
        try:
            update(self, of_model)
        finally:
            self.module = average

    for patched, original in ((__init__, make), (update_parameters, update)):
        vars(patched)["original"] = original
        setattr(AveragedModel, patched.__name__, patched)


def update_averages(model: nn.Module) -> None:
    """Let the averages of this model have the values that it has now: they may be exchanged at any time."""
    for average, averaged in list(_averaged.items()):
        whole = averaged()
        if whole is not None and any(module is model for module in whole.modules()):
            have_same_values(average.module, whole)


def have_same_values(average: nn.Module, model: nn.Module) -> None:
    """Create in the average the values that the model has, from the average's own base tensors, and drop others."""
    for mine, theirs in zip(layers(average).values(), layers(model).values(), strict=True):
        mine.have_values_of(theirs)
    for module in average.modules():
        if is_followed(module):
            follow_layers(module)


def _what_changes(average: nn.Module, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Of both, the parameters that have to be averaged, and the buffers.

    Training does not change base tensors, and an average of equal numbers is not always that number.
    """
    base_tensors = {id(p) for layer in layers(model).values() for p in layer.base_layer.parameters(recurse=False)}
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True)
        if not (id(theirs) in base_tensors or not theirs.requires_grad and torch.equal(mine, theirs.to(mine.device)))
    ]
    both = nn.Module(), nn.Module()
    for part, parameters, whole in zip(both, zip(*pairs), (average, model)):
        part.changing = nn.ParameterList(parameters)
        for i, buffer in enumerate(whole.buffers()):
            part.register_buffer(f"buffer_{i}", buffer)
    return both
