"""GreenTrainerLayer: runs a module with trained values in place of some of its own tensors.

    >>> layer = GreenTrainerLayer(nn.Linear(8, 8), "default")
    >>> layer.add_value("default", "weight")          # a trained copy of base_layer.weight
    >>> layer.set_selected("default", {"weight"})     # ... that is being trained
    >>> layer.weight is layer.greentrainer_values["default"]["weight"]
    True

The base tensor stays as it is, frozen. A tensor that was never selected has no value and costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Set
from functools import partial
from types import MethodType
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tensors.names import candidate_of, tensor_of
from ..tensors.trainable import can_be_trained
from .lock import Lock
from .same_class import inside_of, new_with_class_of
from .shared_tensors import read_through
from .state import EXTRA_STATE, Selection, Values, read


# Attributes of the wrapper that are those of the module.
OF_MODULE = ("weight", "bias", "in_features", "out_features")
# accelerate puts these on a module for which it replaces `forward`: each module has its own, or none.
OF_ACCELERATE = ("_hf_hook", "_old_forward")


class GreenTrainerLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a module that owns floating-point parameters: linear, convolution, embedding, norm, fused experts.

    The *effective tensor* is the one that forward uses: the active adapter's value, cast to the type of the base
    tensor, or the base tensor. Reading it from outside (`layer.weight`) gives the effective tensor too, so that code
    which reads a child's weight trains what it should.

    Args:
        base_layer (`nn.Module`): The module to wrap.
        adapter_name (`str`): The name of the first adapter.
    """

    adapter_layer_names: tuple[str, ...] = ("greentrainer_values",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.greentrainer_values = nn.ModuleDict()
        self.selection_of_values = Selection(self.greentrainer_values)
        self.merged_adapters = []
        self._lock = Lock()
        self._tied: dict[str, tuple[GreenTrainerLayer, str]] = {}
        self._float32_values: dict[str, bool] = {}
        self._unmerged: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._read_by_others: set[str] = set()
        self.add_adapter(adapter_name)
        # From here on what is set on the wrapper is set on the module, but for what the wrapper has.
        self.base_layer = base_layer
        self._modules["greentrainer_values"] = self._modules.pop("greentrainer_values")  # after the module

    def __new__(cls, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> GreenTrainerLayer:
        return new_with_class_of(cls, type(base_layer))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not run that of the module's class, which may keep a register of its subclasses."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made while the program runs, so it cannot be found by its name.
        return new_with_class_of, type(self)._stands_for, self.__dict__

    # Values

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

    def drop_value(self, adapter_name: str, tensor: str) -> None:
        """Forget the value of a tensor, which is then its base tensor again."""
        del self.greentrainer_values[adapter_name][tensor]

    def candidates_with_values(self, adapter_name: str) -> list[str]:
        """The candidates of this module that have a value in the adapter."""
        values = self.greentrainer_values[adapter_name] if adapter_name in self.greentrainer_values else ()
        return list(dict.fromkeys(map(candidate_of, values)))

    def read_from(self, tensor: str, owner: GreenTrainerLayer, owned: str) -> None:
        """Take the value of a tensor from the wrapper that owns it: the two are tied, and so one tensor."""
        self._tied[tensor] = (owner, owned)

    def let_read(self, tensor: str, holder: nn.Module, name: str) -> None:
        """Give the tensor to a module that is not wrapped and holds it under this name: the two are tied."""
        self._read_by_others.add(tensor)
        read_through(holder, name, self, tensor)

    def set_selected(
        self, adapter_name: str, candidates: Set[str], trainable: bool = True, provisional: bool = False
    ) -> None:
        """Train the values of these candidates and freeze the adapter's others."""
        values = self.greentrainer_values[adapter_name]
        values.note_selected(candidates, provisional)
        for name, value in values.items():
            selected = candidate_of(name) in candidates
            value.requires_grad_(trainable and selected)
            if not selected:
                value.grad = None

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

    @torch.compiler.disable
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
        of_adapter = self._modules["greentrainer_values"]._modules
        for adapter in self.active_adapters:
            if adapter in of_adapter:
                values = of_adapter[adapter]
                if values.just_loaded or any(self._was_cast(adapter, v) for v in values._parameters.values()):
                    return False
        return True

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

    def have_values_of(self, other: GreenTrainerLayer) -> None:
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

    # Tensors

    def base_tensor(self, tensor: str) -> Tensor:
        """The base model's own parameter."""
        return self._tensors_of_base(tensor)[tensor]

    def effective_tensor(self, tensor: str) -> Tensor:
        """The tensor that forward uses."""
        owner, name = self._tied.get(tensor, (self, tensor))
        if torch.is_grad_enabled() and not owner._is_settled():
            owner.settle()
        base = owner.base_tensor(name)
        if owner.merged or owner.disable_adapters:
            return base
        return owner._adapted(base, name, owner.active_adapters)

    def _adapted(self, base: Tensor, tensor: str, adapter_names: list[str]) -> Tensor:
        """A tensor as these adapters make it out of its base."""
        return _combine(base, self._values(adapter_names).get(tensor, []))

    def own_changed_tensors(self, adapter_names: list[str]) -> list[str]:
        """The tensors of this module that these adapters change, without those that it reads from another wrapper."""
        return list(self._values(adapter_names))

    def _values(self, adapter_names: list[str]) -> dict[str, list[Tensor]]:
        """The values of these adapters, by tensor."""
        found: dict[str, list[Tensor]] = {}
        # Not through nn.Module's attribute lookup: this runs in every forward pass of every wrapper.
        of_adapter = self._modules["greentrainer_values"]._modules
        for adapter in adapter_names:
            if adapter in of_adapter:
                for tensor, value in of_adapter[adapter].items():
                    found.setdefault(tensor, []).append(value)
        return found

    def base_data(self, tensor: str) -> Tensor:
        """The data of the base tensor, also while an adapter is merged into it."""
        return self._unmerged.get(tensor, self.base_tensor(tensor).detach())

    def _tensors_of_base(self, tensor: str) -> dict[str, Any]:
        base_layer = self._modules["base_layer"]
        # FSDP1 keeps the views of its flat parameter in __dict__, where they hide what is in _parameters.
        return base_layer.__dict__ if tensor in base_layer.__dict__ else base_layer._parameters

    # Differences

    @property
    def is_linear(self) -> bool:
        """Whether the module is linear and its weight one that LoRA's factors could be added to."""
        linear = isinstance(self.base_layer, (nn.Linear, Conv1D))
        return linear and can_be_trained(self.base_layer.weight)

    def merged_tensor(self, adapter_name: str, tensor: str) -> Tensor:
        """A copy of the tensor as merging the adapter would leave it."""
        return self._adapted(self.base_data(tensor), tensor, [adapter_name]).clone()

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

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._modules["base_layer"], *args, **kwargs)

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

    # What peft asks of a tuner layer

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Write the effective values into the base tensors, exactly.

        Args:
            safe_merge (`bool`): Refuse values that are not finite, before anything is written.
            adapter_names (`list[str]`, *optional*): The adapters to merge; default: the active ones.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.greentrainer_values]
        if not adapter_names:
            return
        if safe_merge:
            self.refuse_broken(adapter_names)
        self.merged_adapters = self.merged_adapters + adapter_names
        for tensor in self.own_changed_tensors(self.merged_adapters):
            with torch.inference_mode(False), torch.no_grad():  # or the model could never be trained again
                merged = self._adapted(self.base_data(tensor), tensor, self.merged_adapters).clone()
            self._unmerged.setdefault(tensor, self.base_tensor(tensor).data)
            self.base_tensor(tensor).data = merged

    def refuse_broken(self, adapter_names: Optional[list[str]]) -> None:
        """Raise `ValueError` if an adapter (default: an active one) has a value that is not finite."""
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            values = self.greentrainer_values[adapter] if adapter in self.greentrainer_values else {}
            for tensor, value in values.items():
                if not torch.isfinite(value).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: its {tensor} is "
                        "not finite."
                    )

    def unmerge(self) -> None:
        """Put the base tensors back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        for tensor, base in self._unmerged.items():
            self.base_tensor(tensor).data = base
        self._unmerged = {}
        self.merged_adapters = []

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        # peft turns gradients on for an adapter as a whole; only selected values may have them.
        for adapter, values in self.greentrainer_values.items():
            for name, value in values.items():
                if candidate_of(name) not in values.selected_candidates:
                    value.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        values = self.greentrainer_values[adapter_name] if adapter_name in self.greentrainer_values else {}
        for name, value in list(values.items()):
            if value.device.type != "meta":
                value.data = value.data.to(device or self.base_tensor(tensor_of(name)).device)

    def delete_adapter(self, adapter_name: str) -> None:
        self._float32_values.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # A wrapper is its module to whoever asks or changes it

    @property
    def weight(self) -> Tensor:
        return self._attribute("weight")

    @property
    def bias(self) -> Tensor:
        return self._attribute("bias")

    @property
    def in_features(self) -> Optional[int]:
        return self._attribute("in_features") if hasattr(self.base_layer, "in_features") else self._features("nx")

    @property
    def out_features(self) -> Optional[int]:
        return self._attribute("out_features") if hasattr(self.base_layer, "out_features") else self._features("nf")

    def _features(self, name_in_conv1d: str) -> Optional[int]:
        """None where features mean nothing: peft asks every tuner layer for them."""
        return getattr(self.base_layer, name_in_conv1d, None)

    @property
    def training(self) -> bool:
        return self.base_layer.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "base_layer" in self.__dict__.get("_modules", ()):  # not yet, in `nn.Module.__init__`
            self.base_layer.training = mode

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the wrapped module: tensors as effective tensors, methods that use them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name in OF_ACCELERATE:  # not yet set, while copying or unpickling
                raise
            return self._attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        elif name not in self._tied and name not in self._read_by_others:
            # transformers ties tensors again and again; here they stay tied.
            setattr(self.base_layer, name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name) if self._is_own(name) else delattr(self.base_layer, name)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.base_layer.register_buffer(name, *args, **kwargs)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        self.base_layer.register_parameter(name, param)

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        self.base_layer.add_module(name, module)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module` does, but what is inside is no second module of that class."""
        for name, module in super().named_modules(*args, **kwargs):
            yield name, inside_of(module) if module is self.base_layer else module

    def _is_own(self, name: str) -> bool:
        state = self.__dict__
        if "base_layer" not in state.get("_modules", ()) or name in state or name in state["_modules"]:
            return True
        return name in OF_ACCELERATE or (name not in OF_MODULE and hasattr(type(self)._stands_for[0], name))

    def _attribute(self, name: str) -> Any:
        if isinstance(getattr(type(self.base_layer), name, None), property):  # which may well be made of tensors
            return self._run(getattr, self.base_layer, name)
        value = getattr(self.base_layer, name)
        # In a forward pass FSDP1 has plain tensors where the parameters were.
        if isinstance(value, Tensor) and name in self._tensors_of_base(name):
            return self.effective_tensor(name)
        if isinstance(value, MethodType) and value.__self__ is self.base_layer:
            return partial(self._run, value)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GreenTrainerLayer:
        super()._apply(fn, recurse)
        self._unmerged = {tensor: fn(base) for tensor, base in self._unmerged.items()}
        return self

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        return "greentrainer." + super().__repr__()


def bare(module: nn.Module) -> nn.Module:
    """The module itself, without a wrapper."""
    return module.base_layer if isinstance(module, GreenTrainerLayer) else module


def _combine(base: Tensor, values: list[Tensor]) -> Tensor:
    """The one value, in the type of the base tensor; or base plus the sum of what several values change."""
    if not values:
        return base
    if len(values) == 1:
        return values[0] if values[0].dtype == base.dtype else values[0].to(base.dtype)
    return (base + sum(value - base for value in values)).to(base.dtype)
