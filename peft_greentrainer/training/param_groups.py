"""Keeps the parameter groups of optimizers in step with the selection. The optimizers stay the same objects.

    >>> placed = Placement.of(TrainedBy([optimizer]), base_model, "default")
    >>> placed.groups["model.norm.weight"]["lr"], placed.left_out
    (0.001, {'vision.norm.weight': 'no group has it, nor tells where it belongs'})

The groups are the user's. A tensor belongs to the group that its value is in, or else its base tensor: groups are made from
`model.named_parameters()`, before or after the model is wrapped. One of which neither is in a group goes where what is known
of the others says without doubt; a tensor with no such place is left out of the selection, by name. One that is deselected
loses its state and stays, frozen, so that a resumed run finds the same parameters in the same places. Groups keep the order
of `named_parameters`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..adapter.layer import GreenTrainerLayer
from ..measuring.enclosing import enclosing_modules
from ..measuring.importance import unwrapped
from ..tensors.names import base_name, kind_of, tensor_of
from ..tensors.trainable import can_be_trained
from .taking import NOT_OPTIONS, TensorKind, takes


Group = dict[str, Any]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
# The user's own rule: the name of a tensor in the base model, and the base tensor -> a group of an optimizer, or None to
# leave the tensor out.
GroupOf = Callable[[str, Tensor], Group | None]

# So many names are told in full.
MANY = 10

UNTAKEN = "no optimizer at hand takes such a tensor"
ELSEWHERE = "another optimizer has it, which was not handed over"
UNKNOWN = "no group has it, nor tells where it belongs"
UNWANTED = "group_of leaves it out"


@dataclass(frozen=True)
class TrainedBy:
    """What trains a model.

    Attributes:
        optimizers: those that were handed over.
        group_of: the user's rule, for what has no value in a group yet.
        elsewhere: other optimizers that take steps; a tensor that they have stays theirs.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    group_of: GroupOf | None = None
    elsewhere: Sequence[torch.optim.Optimizer] = ()


@dataclass(frozen=True)
class _Tensor:
    """A base tensor of a wrapper, and what tells where it belongs."""

    name: str
    base: Tensor
    values: list[nn.Parameter]  # of the adapter that is trained first
    kind: TensorKind  # that of its value
    decayed: bool

    @property
    def alike(self) -> tuple:
        """What it has in common with the same tensor of other layers."""
        return kind_of(self.name), self.kind.dimensions, self.decayed


@dataclass(frozen=True)
class _Place:
    optimizer: torch.optim.Optimizer
    group: Group


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

    @classmethod
    def of(cls, trained_by: TrainedBy, model: nn.Module, adapter_name: str) -> Placement:
        """Find the place of every tensor."""
        group_of, optimizers = trained_by.group_of, trained_by.optimizers
        at = {id(p): place for place in _places(optimizers) for p in place.group["params"]}
        others = {id(p) for place in _places(trained_by.elsewhere) for p in place.group["params"]}
        tensors = _tensors(model, adapter_name)
        known = {t.name: next((at[id(p)] for p in (*t.values, t.base) if id(p) in at), None) for t in tensors}
        guess = _Guess(list(_places(optimizers)), tensors, known)
        has_bases = any(id(t.base) in at and not t.base.requires_grad for t in tensors)
        found: dict[str, _Place | str] = {}
        for t in tensors:
            has_value = any(id(value) in at for value in t.values)
            chosen = None if group_of is None else group_of(t.name, t.base)
            if group_of is not None and chosen is None:
                found[t.name] = UNWANTED
            elif group_of is not None and not has_value:
                found[t.name] = guess.checked(t, chosen)
            elif known[t.name] is not None:
                found[t.name] = known[t.name]
            elif any(id(p) in others for p in (*t.values, t.base)):
                found[t.name] = ELSEWHERE
            elif has_bases:  # whoever puts base tensors into groups has left this one out
                found[t.name] = UNKNOWN
            else:
                found[t.name] = guess(t)
        placed = {name: place for name, place in found.items() if isinstance(place, _Place)}
        return cls(
            {name: place.group for name, place in placed.items()},
            {name: place.optimizer for name, place in placed.items()},
            {name: why for name, why in found.items() if isinstance(why, str)},
        )


class _Guess:
    """The place of a tensor that no group has, by what is known of the others."""

    def __init__(self, places: list[_Place], tensors: list[_Tensor], known: dict[str, _Place | None]) -> None:
        self.places = places
        self.order = {t.name: i for i, t in enumerate(tensors)}
        self.known = [(t, known[t.name]) for t in tensors if known[t.name] is not None]
        self._takes = functools.cache(
            lambda place, kind: takes(unwrapped(places[place].optimizer), places[place].group, kind)
        )

    def __call__(self, tensor: _Tensor) -> _Place | str:
        choices = [place for i, place in enumerate(self.places) if self._takes(i, tensor.kind)]
        if not choices:
            return UNTAKEN
        optimizers = {id(place.optimizer): place.optimizer for place in choices}
        if len(optimizers) > 1:
            # Optimizers of several classes share the tensors out by what they are; others may do so by layer.
            classes = {type(unwrapped(optimizer)) for optimizer in optimizers.values()}
            of_others = self._of_others(tensor, enough=1 if len(classes) == len(optimizers) else 2)
            owners = {id(place.optimizer) for place in of_others}
            choices = [place for place in choices if id(place.optimizer) in owners] if len(owners) == 1 else []
        if not choices:
            return UNKNOWN
        if all(_differ_in_decay_only(choices[0].group, place.group) for place in choices):
            return self._as_transformers_would(tensor, choices)
        # In other layers it may be in one group because groups are made by layer: then there is one for this layer.
        of_others = {id(place.group): place for place in self._of_others(tensor, enough=2)}
        none_is_empty = all(place.group["params"] for place in self.places)
        return next(iter(of_others.values())) if len(of_others) == 1 and none_is_empty else UNKNOWN

    def checked(self, tensor: _Tensor, group: Group) -> _Place:
        """The place of a group that the user has chosen."""
        for i, place in enumerate(self.places):
            if place.group is group:
                if not self._takes(i, tensor.kind):
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

    def _of_others(self, tensor: _Tensor, enough: int) -> list[_Place]:
        """Where the same tensor of other layers is; nowhere, if there are not enough of them."""
        found = [place for other, place in self.known if other.alike == tensor.alike]
        return found if len(found) >= enough else []

    def _as_transformers_would(self, tensor: _Tensor, choices: list[_Place]) -> _Place:
        """With the nearest tensor that transformers treats alike in weight decay; where there is none, by that decay."""
        groups = [id(place.group) for place in choices]
        alike = [(t, p) for t, p in self.known if t.decayed == tensor.decayed and id(p.group) in groups]
        if alike:
            here = self.order[tensor.name]
            return min(alike, key=lambda other: abs(self.order[other[0].name] - here))[1]
        by_decay = sorted(choices, key=lambda place: -place.group.get("weight_decay", 0.0))
        return by_decay[0 if tensor.decayed else -1]


def by_reason(reasons: Mapping[str, str]) -> str:
    """The names for each reason, without the numbers of layers where there are many."""
    of_reason: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        of_reason.setdefault(reason, []).append(name)
    short = {r: names if len(names) <= MANY else dict.fromkeys(map(kind_of, names)) for r, names in of_reason.items()}
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in short.items())


def list_of(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers, be they one or several."""
    found = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
    if not (isinstance(found, Sequence) and found and all(hasattr(one, "param_groups") for one in found)):
        raise ValueError(
            f"update_and_allocate takes the optimizer that trains the model, or a list of all of them, and was given "
            f"{optimizer!r}: pass the torch.optim.Optimizer itself."
        )
    return list(found)


def _places(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[_Place]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield _Place(optimizer, group)


def _differ_in_decay_only(group: Group, other: Group) -> bool:
    ignored = {*NOT_OPTIONS, "weight_decay"} - {"initial_lr"}
    options = (group.keys() | other.keys()) - ignored
    return all(group.get(option) == other.get(option) for option in options)


def _tensors(model: nn.Module, adapter_name: str) -> list[_Tensor]:
    # An unbound call: the rule of transformers uses nothing of the Trainer.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    found = []
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer):
            adapters = sorted(module.greentrainer_values, key=lambda adapter: adapter != adapter_name)
            sparse = getattr(module.base_layer, "sparse", False)
            own = module.base_layer.named_parameters(recurse=False)
            for name, base in ((name, base) for name, base in own if can_be_trained(base)):
                of_adapters = [module.greentrainer_values[adapter] for adapter in adapters]
                values = [values[n] for values in of_adapters for n in values if tensor_of(n) == name]
                kind = TensorKind.of(values[0] if values else base, sparse)
                is_decayed = f"{key}.base_layer.{name}" in decayed
                found.append(_Tensor(base_name(f"{key}.{name}"), base, values, kind, is_decayed))
    return found


def keep_in_step(
    optimizers: Sequence[torch.optim.Optimizer],
    model: nn.Module,
    groups: dict[str, Group],
    adapter_name: str,
    dropped: Iterable[nn.Parameter],
) -> None:
    """Let values that are new join their group, forget the state of those that are frozen, and remove `dropped` ones."""
    members = {id(p) for place in _places(optimizers) for p in place.group["params"]}
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer) and adapter_name in module.greentrainer_values:
            for name, value in module.greentrainer_values[adapter_name].items():
                group = groups.get(tensor_of(base_name(f"{key}.{name}")))
                if id(value) not in members and group is not None:
                    group["params"].append(value)
                if not value.requires_grad:
                    for optimizer in optimizers:
                        optimizer.state.pop(value, None)

    dropped = {id(p) for p in dropped}
    place = _order(optimizers, model)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in dropped:
                    optimizer.state.pop(parameter, None)
            kept = [p for p in group["params"] if id(p) not in dropped]
            kept.sort(key=lambda p: place.get(id(p), (-1, ""))[0])
            names = dict(zip(map(id, group["params"]), group.get("param_names", ())))
            group["params"][:] = kept
            if "param_names" in group:
                group["param_names"] = [names[id(p)] if id(p) in names else place[id(p)][1] for p in kept]


def _order(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[int, tuple[int, str]]:
    """The place and the name of every parameter in the module that the groups were made from: one around the model, say."""
    grouped = [p for place in _places(optimizers) for p in place.group["params"]]
    named = {
        (id(p), name)
        for place in _places(optimizers)
        for p, name in zip(place.group["params"], place.group.get("param_names", ()))
    }

    inside = set(map(id, model.parameters()))
    is_whole = not named and all(id(p) in inside for p in grouped)

    def agreement(module: nn.Module) -> tuple[int, int]:
        inside = {id(p): name for name, p in module.named_parameters()}
        return sum(id(p) in inside for p in grouped), len(named & set(inside.items()))

    root = model if is_whole else max(enclosing_modules(model, nn.Module), key=agreement)
    return {id(p): (i, name) for i, (name, p) in enumerate(root.named_parameters())}
