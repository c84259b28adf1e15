"""Runs a module with effective tensors: trained values in place of some of its own tensors.

    >>> layer.effective_tensor("weight") is layer.greentrainer_values["default"]["weight"]    # on a float32 base
    True
    >>> layer.get_delta_weight("default").shape       # what the adapter changes: value minus base tensor
    torch.Size([8, 8])

The *effective tensor* is the one that forward uses: the active adapter's value, cast to the type of the base tensor, or the
base tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tensors.trainable import can_be_trained
from .layer_values import LayerWithValues
from .lock import Lock
from .shared_tensors import read_through


class LayerWithEffectiveTensors(LayerWithValues):
    """The part of a [`GreenTrainerLayer`] that combines base tensors and values, and runs the module with the result."""

    _tied: dict[str, tuple[LayerWithEffectiveTensors, str]]  # type: ignore[assignment]  # the same, of this class
    _read_by_others: set[str]  # tensors that modules which are not wrapped read from here
    _lock: Lock

    # Tied tensors

    def read_from(self, tensor: str, owner: LayerWithEffectiveTensors, owned: str) -> None:
        """Take the value of a tensor from the wrapper that owns it: the two are tied, and so one tensor."""
        self._tied[tensor] = (owner, owned)

    def let_read(self, tensor: str, holder: nn.Module, name: str) -> None:
        """Give the tensor to a module that is not wrapped and holds it under this name: the two are tied."""
        self._read_by_others.add(tensor)
        read_through(holder, name, self, tensor)

    # Effective tensors

    def effective_tensor(self, tensor: str) -> Tensor:
        """The tensor that forward uses."""
        owner, name = self._tied.get(tensor, (self, tensor))
        if torch.is_grad_enabled() and not owner._is_settled():
            owner.settle()
        base = owner.base_tensor(name)
        if owner.merged or owner.disable_adapters:
            return base
        return owner._adapted(base, name, owner.active_adapters)

    def merged_tensor(self, adapter_name: str, tensor: str) -> Tensor:
        """A copy of the tensor as merging the adapter would leave it."""
        return self._adapted(self.base_data(tensor), tensor, [adapter_name]).clone()

    def _adapted(self, base: Tensor, tensor: str, adapter_names: list[str]) -> Tensor:
        """A tensor as these adapters make it out of its base."""
        return _combine(base, self._values(adapter_names).get(tensor, []))

    def _values(self, adapter_names: list[str]) -> dict[str, list[Tensor]]:
        """The values of these adapters, by tensor."""
        found: dict[str, list[Tensor]] = {}
        of_adapter = self._values_by_adapter()
        for adapter in adapter_names:
            if adapter in of_adapter:
                for tensor, value in of_adapter[adapter].items():
                    found.setdefault(tensor, []).append(value)
        return found

    # What an adapter changes

    @property
    def is_linear(self) -> bool:
        """Whether the module is linear and its weight one that LoRA's factors could be added to."""
        linear = isinstance(self.base_layer, (nn.Linear, Conv1D))
        return linear and can_be_trained(cast(Tensor, self.base_layer.weight))

    def own_changed_tensors(self, adapter_names: list[str]) -> list[str]:
        """The tensors of this module that these adapters change, without those that it reads from another wrapper."""
        return list(self._values(adapter_names))

    def changed_tensors(self, adapter_name: str) -> list[str]:
        """The tensors of this module that have a value in the adapter, be it that of the tensor they are tied to."""
        own = self.own_changed_tensors([adapter_name])
        tied = [t for t, (owner, owned) in self._tied.items() if owned in owner.changed_tensors(adapter_name)]
        return [*own, *tied]

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, tensor: str = "weight") -> Tensor:
        """What the adapter changes: the value minus the base tensor, in the shape of the tensor and the value's type."""
        owner, owned = self._tied.get(tensor, (self, tensor))
        base = owner.base_data(owned)
        values = owner._values([adapter_name]).get(owned, [])
        return values[0] - base.to(values[0].dtype) if values else torch.zeros_like(base)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.is_linear and set(self.changed_tensors(adapter_name)) <= {"weight"}

    # Running the module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(cast(nn.Module, self._modules["base_layer"]), *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the base layer, or a method of it, with effective tensors in place of its own."""
        if self.merged_adapters or self._disable_adapters:
            return function(*args, **kwargs)
        if torch.is_grad_enabled() and not self._is_settled():
            self.settle()
        if torch.compiler.is_compiling():
            return self._run_swapped(function, *args, **kwargs)
        with self._lock:
            return self._run_swapped(function, *args, **kwargs)

    def _run_swapped(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        swapped = []

        def swap(tensor: str, effective: Tensor) -> None:
            own = self._tensors_of_base(tensor)
            swapped.append((own, tensor, own[tensor]))
            own[tensor] = effective

        try:
            for tensor, values in self._values(self.active_adapters).items():
                swap(tensor, _combine(self.base_tensor(tensor), values))
            for tensor in self._tied:
                swap(tensor, self.effective_tensor(tensor))
            return function(*args, **kwargs)
        finally:
            for own, tensor, base in swapped:
                own[tensor] = base


def _combine(base: Tensor, values: list[Tensor]) -> Tensor:
    """The one value, in the type of the base tensor; or base plus the sum of what several values change."""
    if not values:
        return base
    if len(values) == 1:
        return values[0] if values[0].dtype == base.dtype else values[0].to(base.dtype)
    return (base + sum(value - base for value in values)).to(base.dtype)
