"""Which tensors an adapter may train: computed once, when it is injected, and kept on the base model.

    >>> candidates = Candidates.of(find_tensors(model), GreenTrainerConfig(target_modules=["q_proj", "v_proj"]))
    >>> candidates.names[0], candidates.owned["model.layers.0.self_attn.q_proj"]
    ('model.layers.0.self_attn.q_proj.weight', ('weight',))

It is made of names only. So it is the same in every copy of the model, and whatever is wrapped, merged or moved since.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..tensors.names import low_rank_form
from .config import GreenTrainerConfig
from .model_tensors import ModelTensor, ModelTensors, Use
from .targets import check_patterns, matches


ATTRIBUTE = "_greentrainer_candidates"


@dataclass(frozen=True)
class Candidates:
    """The candidates of one adapter, and how the modules of its model come by them.

    Attributes:
        names: all of them in order, a tensor before its low-rank form. The adapter selects from these.
        owned: for each module to wrap, the tensors that it owns, by their names there.
        read: for the same modules, the tensors that they read from the module that owns them.
        read_by_others: what modules that are not wrapped read: where, and from which owner.
        tied: for each tensor, the other names that it is known by.
    """

    names: tuple[str, ...]
    owned: Mapping[str, tuple[str, ...]]
    read: Mapping[str, Mapping[str, Use]]
    read_by_others: tuple[tuple[Use, Use], ...]
    tied: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, found: ModelTensors, config: GreenTrainerConfig) -> Candidates:
        """Choose among the tensors of a model.

        A tensor that several modules share belongs to the first of them. It is a candidate if any of them is targeted and
        none is excluded. What was frozen before the model was wrapped is one only where `target_modules` names it.

        Raises:
            ValueError: the config names what the model does not have.
        """
        check_patterns(config, found)
        chosen = _thawed(_targeted(found.tensors, config), config)
        owned: dict[str, tuple[str, ...]] = {}
        read: dict[str, dict[str, Use]] = {}
        for tensor in chosen:
            for use in tensor.uses:
                owned.setdefault(use.module, ())
                read.setdefault(use.module, {})
            owner, *readers = tensor.uses
            owned[owner.module] += (owner.name,)
            for reader in readers:
                read[reader.module][reader.name] = owner
        by_name = {tensor.name: tensor for tensor in chosen}
        in_order = [by_name[Use(module, name).full_name] for module, names in owned.items() for name in names]
        return cls(
            names=tuple(name for tensor in in_order for name in _forms(tensor, config)),
            owned=owned,
            read=read,
            read_by_others=tuple(
                (use, tensor.uses[0]) for tensor in chosen for use in tensor.held_by if use.module not in owned
            ),
            tied={tensor.name: tuple(use.full_name for use in tensor.uses[1:]) for tensor in chosen},
        )

    def uses(self) -> Iterator[tuple[str, str]]:
        """Every use of a tensor by a wrapped module: the module, and the tensor by its name in the base model."""
        for module, names in self.owned.items():
            for name in names:
                yield module, Use(module, name).full_name
            for owner in self.read[module].values():
                yield module, owner.full_name


def _targeted(tensors: Iterable[ModelTensor], config: GreenTrainerConfig) -> list[ModelTensor]:
    everything = copy.copy(config)
    everything.target_modules = ".*"
    return [
        tensor
        for tensor in tensors
        if any(matches(config, use.module) for use in tensor.uses)
        and all(matches(everything, use.module) for use in tensor.uses)
    ]


def _thawed(tensors: list[ModelTensor], config: GreenTrainerConfig) -> list[ModelTensor]:
    """Those of them that the user did not freeze, unless `target_modules` names them."""
    frozen = set(config.frozen or ()) if config.target_modules is None else set()
    names = [{use.full_name for use in tensor.uses} for tensor in tensors]
    # Were all of them frozen, it was not to keep them from being trained here; nor are those that a file changes.
    if not any(map(frozen.isdisjoint, names)):
        return tensors
    frozen.difference_update(config.tensors or ())
    return [tensor for tensor, of_tensor in zip(tensors, names) if frozen.isdisjoint(of_tensor)]


def _forms(tensor: ModelTensor, config: GreenTrainerConfig) -> Iterator[str]:
    if not (config.low_rank == "only" and tensor.is_linear):
        yield tensor.name
    if config.low_rank and tensor.is_linear and len(tensor.uses) == 1:
        yield low_rank_form(tensor.name)


def keep_candidates(model: nn.Module, adapter_name: str, candidates: Candidates) -> None:
    """Keep on a base model what an adapter may train."""
    setattr(model, ATTRIBUTE, getattr(model, ATTRIBUTE, {}) | {adapter_name: candidates})


def candidates_of(model: nn.Module, adapter_name: str) -> Candidates:
    """The candidates of an adapter of this base model."""
    return cast(dict[str, Candidates], getattr(model, ATTRIBUTE))[adapter_name]


def drop_candidates(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter that was deleted, so that the base model keeps no trace of it."""
    kept = cast(dict[str, Candidates], getattr(model, ATTRIBUTE))
    setattr(model, ATTRIBUTE, {name: candidates for name, candidates in kept.items() if name != adapter_name})


def stop_keeping_candidates(model: nn.Module) -> None:
    """Leave no trace of this package in a base model that has no wrappers any more."""
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)
