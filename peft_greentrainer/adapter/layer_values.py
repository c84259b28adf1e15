"""The values that a wrapper has, adapter by adapter: how they are created, kept in float32, selected and loaded.

>>> layer.add_value("default", "weight")          # a trained copy of base_layer.weight, frozen as yet
>>> layer.set_selected("default", {"weight"})     # ... that is being trained
>>> layer.greentrainer_values["default"]["weight"].requires_grad
True
"""

from __future__ import annotations

from collections.abc import Sequence, Set, ValuesView
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tensors.names import candidate_of, tensor_of
from .state import EXTRA_STATE, Values, ValuesOfAdapters, read


class LayerWithValues(nn.Module, BaseTunerLayer):
    """The part of a [`GreenTrainerLayer`] that holds the values of a module's tensors."""

    base_layer: nn.Module
    greentrainer_values: ValuesOfAdapters
    _float32_values: dict[str, bool]  # by adapter: whether values are in float32 on a half-precision base
    _unmerged: dict[str, Tensor]  # the data of base tensors that an adapter is merged into
    _tied: dict[
        str, tuple[LayerWithValues, str]
    ]  # tensors that are those of another wrapper: which, and which of its own

    # The base tensors

    def base_tensor(self, tensor: str) -> Tensor:
        """The base model's own parameter."""
        return cast(Tensor, self._tensors_of_base(tensor)[tensor])

    def base_data(self, tensor: str) -> Tensor:
        """The data of the base tensor, also while an adapter is merged into it."""
        return self._unmerged.get(tensor, self.base_tensor(tensor).detach())

    def _tensors_of_base(self, tensor: str) -> dict[str, Any]:
        base_layer = cast(nn.Module, self._modules["base_layer"])
        # FSDP1 keeps the views of its flat parameter in __dict__, where they hide what is in _parameters.
        return base_layer.__dict__ if tensor in base_layer.__dict__ else base_layer._parameters

    # Creating values

    def add_adapter(self, adapter_name: str) -> None:
        """Make room for the values of an adapter."""
        self.greentrainer_values[adapter_name] = Values()
        self._float32_values[adapter_name] = True

    def add_value(self, adapter_name: str, tensor: str, init_weights: bool = True) -> None:
        """Create the value of a tensor, frozen: a copy of the base tensor, in float32 on a half-precision base.

        Weights that are trained in pure bfloat16 do not move at the usual learning rates.
        """
        base = self.base_data(tensor)
        # With low_cpu_mem_usage new parameters go to the meta device as they are registered: then copy nothing before.
        registered = nn.ParameterList([torch.empty(0, device=base.device)])[0]
        value = base.to(registered.device, self._value_dtype(adapter_name, tensor), copy=True)
        if not init_weights:
            value += torch.randn_like(value) * 0.1
        self._keep_value(adapter_name, tensor, value)

    def _keep_value(self, adapter_name: str, name: str, value: Tensor) -> None:
        values = self.greentrainer_values[adapter_name]
        values[name] = nn.Parameter(value, requires_grad=False)
        # In one order, whenever they came: an optimizer's state is loaded by position.
        tensors = list(self.base_layer._parameters)
        for kept in sorted(values, key=lambda kept: (tensors.index(tensor_of(kept)), kept)):
            values[kept] = values.pop(kept)

    def drop_value(self, adapter_name: str, candidate: str) -> None:
        """Forget the value of a candidate: its tensor is then the base tensor again."""
        values = self.greentrainer_values[adapter_name]
        for name in [name for name in values if candidate_of(name) == candidate]:
            del values[name]

    def candidates_with_values(self, adapter_name: str) -> list[str]:
        """The candidates of this module that have a value in the adapter."""
        if adapter_name not in self.greentrainer_values:
            return []
        return list(dict.fromkeys(map(candidate_of, self.greentrainer_values[adapter_name])))

    # Selecting among them

    def set_selected(
        self, adapter_name: str, candidates: Set[str], trainable: bool = True, provisional: bool = False
    ) -> None:
        """Train the values of these candidates and freeze the adapter's others.

        Args:
            adapter_name (`str`): The adapter.
            candidates (`set[str]`): By their names in this module.
            trainable (`bool`): Whether the adapter is active and for training; if not, no value requires grad.
            provisional (`bool`): Whether they were chosen from sizes alone.
        """
        self.greentrainer_values[adapter_name].note_selected(candidates, provisional)
        self.update_requires_grad(adapter_name, trainable)

    def update_requires_grad(self, adapter_name: str, trainable: bool) -> None:
        """Let the values require grad that are selected, or all of them where a state was just loaded."""
        values = self.greentrainer_values[adapter_name]
        for name, value in values.items():
            selected = candidate_of(name) in values.selected_candidates
            value.requires_grad_(trainable and (selected or values.just_loaded))
            if not selected:
                value.grad = None

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # peft turns gradients on for an adapter as a whole; only selected values may have them.
        for values in self.greentrainer_values.values():
            for name, value in values.items():
                if candidate_of(name) not in values.selected_candidates:
                    value.requires_grad_(False)

    # The type that they are trained in

    def set_value_dtype(self, adapter_name: str, float32: bool) -> None:
        """Keep values in float32 on a half-precision base (`True`), or in the type of the base tensor."""
        self._float32_values[adapter_name] = float32
        values = self.greentrainer_values[adapter_name]
        for name, value in list(values.items()):
            dtype = self._value_dtype(adapter_name, name)
            if value.dtype != dtype:
                values[name] = nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)

    def _value_dtype(self, adapter_name: str, tensor: str) -> torch.dtype:
        dtype = self.base_tensor(tensor_of(tensor)).dtype
        return torch.float32 if self._float32_values[adapter_name] and dtype.itemsize < 4 else dtype

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def settle(self) -> None:
        """Before the first pass: let only what is selected require grad, in the type that it is to be trained in.

        A state was loaded, and with it every value may require grad until an optimizer is made. Or values were cast
        with the model, or since they require grad: in half precision they do not move.
        """
        for adapter in self.active_adapters:
            if adapter in self.greentrainer_values:
                if self.greentrainer_values[adapter].just_loaded:
                    self.greentrainer_values[adapter].just_loaded = False
                    self._freeze_non_trainable_peft_weights()
                self._undo_casts(adapter)

    def _is_settled(self) -> bool:
        of_adapter = self._values_by_adapter()
        for adapter in self.active_adapters:
            if adapter in of_adapter:
                values = of_adapter[adapter]
                parameters = cast(ValuesView[nn.Parameter], values._parameters.values())
                if values.just_loaded or any(self._was_cast(adapter, value) for value in parameters):
                    return False
        return True

    def _values_by_adapter(self) -> dict[str, Values]:
        # Not through nn.Module's attribute lookup: this runs in every forward pass of every wrapper.
        of_adapters = cast(ValuesOfAdapters, self._modules["greentrainer_values"])
        return cast(dict[str, Values], of_adapters._modules)

    def _was_cast(self, adapter_name: str, value: nn.Parameter) -> bool:
        return value.dtype.itemsize < 4 and value.requires_grad and self._float32_values[adapter_name]

    def _undo_casts(self, adapter_name: str) -> None:
        """What still is the base tensor, rounded, is that again without rounding; the optimizer has the parameters."""
        for name, value in self.greentrainer_values[adapter_name].items():
            if self._was_cast(adapter_name, value):
                first, dtype = self._first_data(adapter_name, name), self._value_dtype(adapter_name, name)
                trained = not torch.equal(first.to(value.device, value.dtype), value)
                value.data = (value.data if trained else first).to(value.device, dtype, copy=True)

    def _first_data(self, adapter_name: str, name: str) -> Tensor:
        """What a value was created as."""
        return self.base_data(name)

    # Taking over those of a state, or of another copy of the model

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        told = read(state_dict[prefix + EXTRA_STATE]) if prefix + EXTRA_STATE in state_dict else {}
        for adapter, values in self.greentrainer_values.items():
            start = f"{prefix}greentrainer_values.{adapter}."
            named = {candidate_of(key.removeprefix(start)) for key in state_dict if key.startswith(start)}
            here = set(self.candidates_with_values(adapter))
            for candidate in (here - named) if adapter in told else ():
                self.drop_value(adapter, candidate)
            for candidate in sorted(named - here):
                if self._create_value(adapter, candidate):
                    values.note_selected(values.selected_candidates | {candidate}, values.is_provisional)
            self._undo_casts(adapter)  # what is loaded into them is not rounded
        super()._load_from_state_dict(state_dict, prefix, *args)

    def have_values_of(self, other: LayerWithValues) -> None:
        """Have the values that the same module of another copy of the model has: new ones start at the base tensor."""
        for adapter, values in other.greentrainer_values.items():
            if adapter not in self.greentrainer_values:
                raise ValueError(
                    f"The copy of the model was made before the adapter '{adapter}' was added: make it anew."
                )
            here, there = set(self.candidates_with_values(adapter)), set(other.candidates_with_values(adapter))
            for candidate in here - there:
                self.drop_value(adapter, candidate)
            for candidate in sorted(there - here):
                self._create_value(adapter, candidate)
            self._undo_casts(adapter)
            self.greentrainer_values[adapter].note_selected(values.selected_candidates, values.is_provisional)

    def _create_value(self, adapter_name: str, candidate: str) -> bool:
        """Create the value of a candidate that a state names, if this module can have it."""
        can = candidate in self.base_layer._parameters and candidate not in self._tied
        if can:
            self.add_value(adapter_name, candidate)
        return can
