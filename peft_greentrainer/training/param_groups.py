"""Keeps the parameter groups of optimizers in step with the selection. The optimizers stay the same objects.

>>> keep_in_step([optimizer], base_model, placement.groups, "default", dropped=[])
>>> len(optimizer.param_groups[0]["params"])      # with those that are newly selected
17

A value that is deselected loses its state and stays, frozen, so that a resumed run finds the same parameters in the same
places. Groups keep the order of `named_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import GreenTrainerLayer
from ..measuring.enclosing import enclosing_modules
from ..tensors.names import base_name, tensor_of


Group = dict[str, Any]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
# The user's own rule: the name of a tensor in the base model, and the base tensor -> a group of an optimizer, or None to
# leave the tensor out.
GroupOf = Callable[[str, Tensor], Group | None]


@dataclass(frozen=True)
class Place:
    """A parameter group, with the optimizer that it is of."""

    optimizer: torch.optim.Optimizer
    group: Group


def as_list(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers, be they one or several."""
    found: Any = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
    if not (isinstance(found, Sequence) and found and all(hasattr(one, "param_groups") for one in found)):
        raise ValueError(
            f"update_and_allocate takes the optimizer that trains the model, or a list of all of them, and was given "
            f"{optimizer!r}: pass the torch.optim.Optimizer itself."
        )
    return list(found)


def all_places(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Place]:
    """Every group of every optimizer, in order."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield Place(optimizer, group)


def keep_in_step(
    optimizers: Sequence[torch.optim.Optimizer],
    model: nn.Module,
    groups: dict[str, Group],
    adapter_name: str,
    dropped: Iterable[nn.Parameter],
) -> None:
    """Let values that are new join their group, forget the state of those that are frozen, and remove `dropped` ones."""
    members = {id(p) for place in all_places(optimizers) for p in place.group["params"]}
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer) and adapter_name in module.greentrainer_values:
            for name, value in module.greentrainer_values[adapter_name].named_parameters():
                group = groups.get(tensor_of(base_name(f"{key}.{name}")))
                if id(value) not in members and group is not None:
                    group["params"].append(value)
                if not value.requires_grad:
                    for optimizer in optimizers:
                        optimizer.state.pop(value, None)

    gone = {id(p) for p in dropped}
    place = _order(optimizers, model)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            kept = [p for p in group["params"] if id(p) not in gone]
            kept.sort(key=lambda p: place.get(id(p), (-1, ""))[0])
            names = dict(zip(map(id, group["params"]), group.get("param_names", ())))
            group["params"][:] = kept
            if "param_names" in group:
                group["param_names"] = [names[id(p)] if id(p) in names else place[id(p)][1] for p in kept]


def _order(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[int, tuple[int, str]]:
    """The place and the name of every parameter in the module that the groups were made from: one around the model, say."""
    grouped = [p for place in all_places(optimizers) for p in place.group["params"]]
    named = {
        (id(p), name)
        for place in all_places(optimizers)
        for p, name in zip(place.group["params"], place.group.get("param_names", ()))
    }

    inside = set(map(id, model.parameters()))
    is_whole = not named and all(id(p) in inside for p in grouped)

    def agreement(module: nn.Module) -> tuple[int, int]:
        inside = {id(p): name for name, p in module.named_parameters()}
        return sum(id(p) in inside for p in grouped), len(named & set(inside.items()))

    root = model if is_whole else max(enclosing_modules(model, nn.Module), key=agreement)
    return {id(p): (i, name) for i, (name, p) in enumerate(root.named_parameters())}
