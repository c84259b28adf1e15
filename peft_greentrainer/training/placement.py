"""Finds the parameter group that each tensor belongs to.

    >>> placement = find_placement(OptimizerSetup([optimizer]), base_model, "default")
    >>> placement.groups["model.norm.weight"]["lr"], placement.left_out
    (0.001, {'vision.norm.weight': 'no group has it, nor tells where it belongs'})

The groups are the user's. A tensor belongs to the group that its value is in, or else its base tensor: groups are made from
`model.named_parameters()`, before or after the model is wrapped. One of which neither is in a group goes where what is known
of the others says without doubt; a tensor with no such place is left out of the selection, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..adapter.layer import GreenTrainerLayer
from ..measuring.importance import unwrapped
from ..tensors.names import base_name, kind_of, tensor_of
from ..tensors.trainable import can_be_trained
from .acceptance import NOT_OPTIONS, TensorKind, accepts
from .param_groups import Group, GroupOf, Place, all_places


# So many names are told in full.
MANY = 10

UNTAKEN = "no optimizer at hand takes such a tensor"
ELSEWHERE = "another optimizer has it, which was not handed over"
UNKNOWN = "no group has it, nor tells where it belongs"
UNWANTED = "group_of leaves it out"


@dataclass(frozen=True)
class OptimizerSetup:
    """What trains a model.

    Attributes:
        optimizers: those that were handed over.
        group_of: the user's rule, for what has no value in a group yet.
        others: optimizers that take steps and were not handed over; a tensor that they have stays theirs.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    group_of: GroupOf | None = None
    others: Sequence[torch.optim.Optimizer] = ()


@dataclass(frozen=True)
class _Tensor:
    """A base tensor of a wrapper, and what tells where it belongs."""

    name: str
    base: Tensor
    values: list[nn.Parameter]  # of the adapter that is trained first
    kind: TensorKind  # that of its value
    decayed: bool

    @property
    def alike(self) -> tuple[str, int, bool]:
        """What it has in common with the same tensor of other layers."""
        return kind_of(self.name), self.kind.dimensions, self.decayed


@dataclass(frozen=True)
class Placement:
    """For each base tensor, by its name in the base model, the group that its value is or would be in.

    Attributes:
        groups: the group of each tensor that has a place.
        optimizers: the optimizer of each tensor that has a place.
        left_out: why a tensor has none.
    """

    groups: dict[str, Group]
    optimizers: dict[str, torch.optim.Optimizer]
    left_out: dict[str, str]

    def why_left_out(self, candidates: Iterable[str]) -> str:
        """What to say of these candidates, which have no place, and what there is to do."""
        reasons = {name: self.left_out[name] for name in map(tensor_of, candidates)}
        return (
            f"{by_reason(reasons)}. Put the base tensors into the parameter groups too (model.named_parameters(), whether they "
            "require grad or not), hand over a list of all optimizers, or pass group_of=... to say which group of an "
            "optimizer a tensor belongs to. exclude_modules takes modules out of the selection without a warning."
        )


def find_placement(setup: OptimizerSetup, model: nn.Module, adapter_name: str) -> Placement:
    """Find the group of every tensor.

    Args:
        setup: the optimizers that train the model, and the user's rule.
        model: the base model.
        adapter_name: the adapter that is trained; its values come before those of others.

    Raises:
        ValueError: the user's rule returns what is no group, or one that does not take the tensor.
    """
    in_groups = {id(p): place for place in all_places(setup.optimizers) for p in place.group["params"]}
    in_others = {id(p) for place in all_places(setup.others) for p in place.group["params"]}
    tensors = _tensors(model, adapter_name)
    # Where a value is counts before where its base tensor is.
    known = {t.name: in_groups[id(p)] for t in tensors for p in (t.base, *reversed(t.values)) if id(p) in in_groups}
    guess = _Guess(list(all_places(setup.optimizers)), tensors, known)
    has_bases = any(id(t.base) in in_groups and not t.base.requires_grad for t in tensors)
    found: dict[str, Place | str] = {}
    for t in tensors:
        has_value = any(id(value) in in_groups for value in t.values)
        chosen = None if setup.group_of is None else setup.group_of(t.name, t.base)
        if setup.group_of is not None and chosen is None:
            found[t.name] = UNWANTED
        elif chosen is not None and not has_value:
            found[t.name] = guess.checked(t, chosen)
        elif t.name in known:
            found[t.name] = known[t.name]
        elif any(id(p) in in_others for p in (*t.values, t.base)):
            found[t.name] = ELSEWHERE
        elif has_bases:  # whoever puts base tensors into groups has left this one out
            found[t.name] = UNKNOWN
        else:
            found[t.name] = guess.place_of(t)
    placed = {name: place for name, place in found.items() if isinstance(place, Place)}
    return Placement(
        {name: place.group for name, place in placed.items()},
        {name: place.optimizer for name, place in placed.items()},
        {name: why for name, why in found.items() if isinstance(why, str)},
    )


class _Guess:
    """The place of a tensor that no group has, by what is known of the others."""

    def __init__(self, places: list[Place], tensors: list[_Tensor], known: Mapping[str, Place]) -> None:
        self.places = places
        self.order = {t.name: i for i, t in enumerate(tensors)}
        self.known = [(t, known[t.name]) for t in tensors if t.name in known]
        self._accepts = functools.cache(lambda i, kind: accepts(unwrapped(places[i].optimizer), places[i].group, kind))

    def place_of(self, tensor: _Tensor) -> Place | str:
        """Its place; where there is none without doubt, why not."""
        choices = [place for i, place in enumerate(self.places) if self._accepts(i, tensor.kind)]
        if not choices:
            return UNTAKEN
        optimizers = {id(place.optimizer): place.optimizer for place in choices}
        if len(optimizers) > 1:
            # Optimizers of several classes share the tensors out by what they are; others may do so by layer.
            classes = {type(unwrapped(optimizer)) for optimizer in optimizers.values()}
            found = self._found_elsewhere(tensor, enough=1 if len(classes) == len(optimizers) else 2)
            owners = {id(place.optimizer) for place in found}
            choices = [place for place in choices if id(place.optimizer) in owners] if len(owners) == 1 else []
        if not choices:
            return UNKNOWN
        if all(_differ_in_decay_only(choices[0].group, place.group) for place in choices):
            return self._as_transformers_would(tensor, choices)
        # In other layers it may be in one group because groups are made by layer: then there is one for this layer.
        by_group = {id(place.group): place for place in self._found_elsewhere(tensor, enough=2)}
        none_is_empty = all(place.group["params"] for place in self.places)
        return next(iter(by_group.values())) if len(by_group) == 1 and none_is_empty else UNKNOWN

    def checked(self, tensor: _Tensor, group: Group) -> Place:
        """The place of a group that the user has chosen."""
        for i, place in enumerate(self.places):
            if place.group is group:
                if not self._accepts(i, tensor.kind):
                    raise ValueError(
                        f"group_of puts {tensor.name}, a tensor of {tensor.kind.dimensions} dimensions, into a group of "
                        f"{type(unwrapped(place.optimizer)).__name__}, which does not take it: return another group, or None "
                        "to leave the tensor out."
                    )
                return place
        raise ValueError(
            f"group_of must return one of the param_groups of the optimizers that are handed over, or None to leave the "
            f"tensor out; for {tensor.name} it returned {type(group).__name__}."
        )

    def _found_elsewhere(self, tensor: _Tensor, enough: int) -> list[Place]:
        """Where the same tensor of other layers is; nowhere, if there are not enough of them."""
        found = [place for other, place in self.known if other.alike == tensor.alike]
        return found if len(found) >= enough else []

    def _as_transformers_would(self, tensor: _Tensor, choices: list[Place]) -> Place:
        """With the nearest tensor that transformers treats alike in weight decay; where there is none, by that decay."""
        groups = [id(place.group) for place in choices]
        alike = [(t, p) for t, p in self.known if t.decayed == tensor.decayed and id(p.group) in groups]
        if alike:
            here = self.order[tensor.name]
            return min(alike, key=lambda other: abs(self.order[other[0].name] - here))[1]
        by_decay = sorted(choices, key=lambda place: -place.group.get("weight_decay", 0.0))
        return by_decay[0 if tensor.decayed else -1]


def _tensors(model: nn.Module, adapter_name: str) -> list[_Tensor]:
    # An unbound call: the rule of transformers uses nothing of the Trainer.
    decayed = set(cast(Any, Trainer).get_decay_parameter_names(None, model))
    found = []
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer):
            adapters = sorted(module.greentrainer_values, key=lambda adapter: adapter != adapter_name)
            named = [item for adapter in adapters for item in module.greentrainer_values[adapter].named_parameters()]
            sparse = getattr(module.base_layer, "sparse", False)
            own = module.base_layer.named_parameters(recurse=False)
            for name, base in ((name, base) for name, base in own if can_be_trained(base)):
                values = [value for n, value in named if tensor_of(n) == name]
                kind = TensorKind.from_tensor(values[0] if values else base, sparse)
                is_decayed = f"{key}.base_layer.{name}" in decayed
                found.append(_Tensor(base_name(f"{key}.{name}"), base, values, kind, is_decayed))
    return found


def _differ_in_decay_only(group: Group, other: Group) -> bool:
    ignored = {*NOT_OPTIONS, "weight_decay"} - {"initial_lr"}
    options = (group.keys() | other.keys()) - ignored
    return all(group.get(option) == other.get(option) for option in options)


def by_reason(reasons: Mapping[str, str]) -> str:
    """The names for each reason, without the numbers of layers where there are many."""
    names_of: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        names_of.setdefault(reason, []).append(name)
    short = {r: names if len(names) <= MANY else dict.fromkeys(map(kind_of, names)) for r, names in names_of.items()}
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in short.items())
