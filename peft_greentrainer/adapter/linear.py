"""GreenTrainerLinear: the wrapper of a linear module, whose weight can be trained whole or as a low-rank update.

    >>> layer = wrap(nn.Linear(8, 8), "default", LowRankForm(rank=2, lr=10.0))
    >>> layer.add_factors("default", "weight_low_rank")          # two factors, as yet without effect
    >>> layer.set_selected("default", {"weight_low_rank"})       # ... that are being trained

What is learned in either form stays: an update is added to the whole value, or to the base tensor where there is none.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tensors.forms import LowRankForm, LowRankUpdate
from ..tensors.names import candidate_of, factors, is_low_rank, low_rank_form, tensor_of
from .layer import OF_MODULE, GreenTrainerLayer


FACTORS_OF_WEIGHT = factors(low_rank_form("weight"))


class GreenTrainerLinear(GreenTrainerLayer):
    """
    Wraps a linear module. By the name of this class peft finds it for the "all-linear" of a second adapter.

    Args:
        base_layer (`nn.Linear` or `Conv1D`): The module to wrap.
        adapter_name (`str`): The name of the first adapter.
        form ([`LowRankForm`]): How the low-rank updates of that adapter are made.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, form: Optional[LowRankForm] = None) -> None:
        self._forms: dict[str, Optional[LowRankForm]] = {adapter_name: form}
        self._seeds: dict[str, int] = {}
        super().__init__(base_layer, adapter_name)

    def add_adapter(self, adapter_name: str, form: Optional[LowRankForm] = None) -> None:
        super().add_adapter(adapter_name)
        self._forms.setdefault(adapter_name, form)

    def delete_adapter(self, adapter_name: str) -> None:
        self._forms.pop(adapter_name, None)
        self._seeds.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def add_factors(self, adapter_name: str, candidate: str, init_weights: bool = True, seed: int = 0) -> None:
        """Create the factors of a low-rank update, frozen: as yet without effect."""
        if not hasattr(self, "greentrainer_update"):
            self._modules["greentrainer_update"] = LowRankUpdate()  # of the wrapper, not of the module
        form = self._forms[adapter_name]
        self._seeds[adapter_name] = seed
        first = form.first_factor(self.in_features, seed)
        second = torch.zeros(self.out_features, form.rank, device="cpu")
        if not init_weights:
            second += torch.randn_like(second) * 0.1 / form.lr
        for name, factor in zip(factors(candidate), (first, second)):
            factor = factor.to(self.base_data("weight").device, self._value_dtype(adapter_name, name))
            self._keep_value(adapter_name, name, factor)

    def drop_value(self, adapter_name: str, tensor: str) -> None:
        values = self.greentrainer_values[adapter_name]
        for name in [name for name in values if candidate_of(name) == tensor]:
            del values[name]

    def _first_data(self, adapter_name: str, name: str) -> Tensor:
        if name not in FACTORS_OF_WEIGHT:
            return super()._first_data(adapter_name, name)
        form = self._forms[adapter_name]
        if name == FACTORS_OF_WEIGHT[0]:
            return form.first_factor(self.in_features, self._seeds[adapter_name])
        return torch.zeros(self.out_features, form.rank, device="cpu")

    def _create_value(self, adapter_name: str, candidate: str) -> bool:
        if not is_low_rank(candidate):
            return super()._create_value(adapter_name, candidate)
        form = self._forms[adapter_name]
        can = tensor_of(candidate) == "weight" and form is not None and form.rank > 0
        if can:
            self.add_factors(adapter_name, candidate, seed=self._seeds.get(adapter_name, 0))
        return can

    def have_values_of(self, other: GreenTrainerLayer) -> None:
        self._seeds = dict(other._seeds)
        super().have_values_of(other)

    def all_factors(self) -> Iterator[nn.Parameter]:
        """The factors of all adapters."""
        for values in self.greentrainer_values.values():
            yield from (value for name, value in values.items() if name in FACTORS_OF_WEIGHT)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged_adapters or self._disable_adapters:
            return super().forward(*args, **kwargs)
        if torch.is_grad_enabled() and not self._is_settled():
            self.settle()
        # Before the base layer's own product, which gradient checkpointing then need not run again.
        updates = [
            self.greentrainer_update(*(args or kwargs.values()), *u) for u in self._updates(self.active_adapters)
        ]
        output = super().forward(*args, **kwargs)
        for update in updates:
            output = output + update.to(output.dtype)
        return output

    def _updates(self, adapter_names: list[str]) -> Iterator[tuple[Tensor, Tensor, LowRankForm]]:
        of_adapter = self._modules["greentrainer_values"]._modules
        first, second = FACTORS_OF_WEIGHT
        for adapter in adapter_names:
            values = of_adapter[adapter]._parameters if adapter in of_adapter else ()
            if first in values:
                yield values[first], values[second], self._forms[adapter]

    def _values(self, adapter_names: list[str]) -> dict[str, list[Tensor]]:
        found = super()._values(adapter_names)
        for name in FACTORS_OF_WEIGHT:
            found.pop(name, None)
        return found

    def own_changed_tensors(self, adapter_names: list[str]) -> list[str]:
        updated = ["weight"] if any(self._updates(adapter_names)) else []
        return list(dict.fromkeys([*super().own_changed_tensors(adapter_names), *updated]))

    def _adapted(self, base: Tensor, tensor: str, adapter_names: list[str]) -> Tensor:
        adapted = super()._adapted(base, tensor, adapter_names)
        if tensor == "weight":
            for update in self._updates(adapter_names):
                adapted = (adapted + self._product(*update)).to(adapted.dtype)
        return adapted

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, tensor: str = "weight") -> Tensor:
        delta = super().get_delta_weight(adapter_name, tensor)
        updates = self._updates([adapter_name]) if tensor == "weight" else ()
        return sum((self._product(*update) for update in updates), start=delta)

    def _product(self, factor_a: Tensor, factor_b: Tensor, form: LowRankForm) -> Tensor:
        product = factor_b @ factor_a * form.scale
        return product.T if isinstance(self.base_layer, Conv1D) else product


def wrap(module: nn.Module, adapter_name: str, form: Optional[LowRankForm] = None) -> GreenTrainerLayer:
    """The wrapper for this module."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return GreenTrainerLinear(module, adapter_name, form)
    return GreenTrainerLayer(module, adapter_name)


def names_of_both(module: nn.Module) -> list[str]:
    """What a wrapper and this module would both be asked for, by one name: such a module cannot be wrapped."""
    names = {*dir(type(module)), *vars(module), *module._parameters, *module._buffers, *module._modules}
    return sorted(names & NAMES_OF_WRAPPERS)


def _names_of_wrappers() -> set[str]:
    wrapper = GreenTrainerLinear(nn.Linear(1, 1), "default")
    names = {*dir(GreenTrainerLinear), *vars(wrapper), *wrapper._modules, "greentrainer_update"}
    of_all = {*dir(nn.Module()), *OF_MODULE, *vars(ABC), "_abc_impl", "__abstractmethods__"}
    return names - of_all


NAMES_OF_WRAPPERS = _names_of_wrappers()


def can_be_low_rank(module: nn.Module) -> bool:
    """Whether this module does what `F.linear` does: only then is an update of its output one of its weight."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)
