"""GreenTrainerLinear: the wrapper of a linear module, whose weight can be trained whole or as a low-rank update.

    >>> layer = wrap(nn.Linear(8, 8), "default")
    >>> layer.low_rank_forms["default"] = LowRankForm(rank=2, lr=10.0)
    >>> layer.add_factors("default", "weight_low_rank")          # two factors, as yet without effect
    >>> layer.set_selected("default", {"weight_low_rank"})       # ... that are being trained

What is learned in either form stays: an update is added to the whole value, or to the base tensor where there is none.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tensors.forms import LowRankForm, LowRankUpdate, has_low_rank_form
from ..tensors.names import factors, is_low_rank, low_rank_form, tensor_of
from .layer import GreenTrainerLayer
from .layer_values import LayerWithValues
from .stand_in import OF_MODULE


FIRST, SECOND = factors(low_rank_form("weight"))


class GreenTrainerLinear(GreenTrainerLayer):
    """
    Wraps a linear module. By the name of this class peft finds it for the "all-linear" of a second adapter.

    Args:
        base_layer (`nn.Linear` or `Conv1D`): The module to wrap.
        adapter_name (`str`): The name of the first adapter.

    Attributes:
        low_rank_forms: how the low-rank updates of each adapter are made; to be set before one is.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        self.low_rank_forms: dict[str, LowRankForm] = {}
        self._seeds: dict[str, int] = {}
        super().__init__(base_layer, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        self.low_rank_forms.pop(adapter_name, None)
        self._seeds.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def add_factors(self, adapter_name: str, candidate: str, init_weights: bool = True, seed: int = 0) -> None:
        """Create the factors of a low-rank update, frozen: as yet without effect."""
        if not hasattr(self, "greentrainer_update"):
            self._modules["greentrainer_update"] = LowRankUpdate()  # of the wrapper, not of the module
        self._seeds[adapter_name] = seed
        for name in factors(candidate):
            factor = self._first_factor(adapter_name, name)
            if name == SECOND and not init_weights:
                factor += torch.randn_like(factor) * 0.1 / self.low_rank_forms[adapter_name].lr
            factor = factor.to(self.base_data("weight").device, self._value_dtype(adapter_name, name))
            self._keep_value(adapter_name, name, factor)

    def _first_factor(self, adapter_name: str, name: str) -> Tensor:
        """What a factor is created as: the first one by chance, the second one as zeros."""
        form = self.low_rank_forms[adapter_name]
        if name == FIRST:
            return form.first_factor(cast(int, self.in_features), self._seeds[adapter_name])
        return torch.zeros(cast(int, self.out_features), form.rank, device="cpu")

    def _first_data(self, adapter_name: str, name: str) -> Tensor:
        is_factor = name in (FIRST, SECOND)
        return self._first_factor(adapter_name, name) if is_factor else super()._first_data(adapter_name, name)

    def _create_value(self, adapter_name: str, candidate: str) -> bool:
        if not is_low_rank(candidate):
            return super()._create_value(adapter_name, candidate)
        can = tensor_of(candidate) == "weight" and has_low_rank_form(self.base_layer)
        if can:
            self.add_factors(adapter_name, candidate, seed=self._seeds.get(adapter_name, 0))
        return can

    def have_values_of(self, other: LayerWithValues) -> None:
        self._seeds = dict(cast(GreenTrainerLinear, other)._seeds)
        super().have_values_of(other)

    def all_factors(self) -> Iterator[nn.Parameter]:
        """The factors of all adapters."""
        for values in self.greentrainer_values.values():
            yield from (value for name, value in values.items() if name in (FIRST, SECOND))

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
        of_adapter = self._values_by_adapter()
        for adapter in adapter_names:
            if adapter in of_adapter and FIRST in of_adapter[adapter]._parameters:
                yield of_adapter[adapter][FIRST], of_adapter[adapter][SECOND], self.low_rank_forms[adapter]

    def _values(self, adapter_names: list[str]) -> dict[str, list[Tensor]]:
        found = super()._values(adapter_names)
        for name in (FIRST, SECOND):
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


def wrap(module: nn.Module, adapter_name: str) -> GreenTrainerLayer:
    """The wrapper for this module."""
    is_linear = isinstance(module, (nn.Linear, Conv1D))  # for peft, whatever its subclass does
    return (GreenTrainerLinear if is_linear else GreenTrainerLayer)(module, adapter_name)


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
