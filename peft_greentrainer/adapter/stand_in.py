"""A wrapper is its module to whoever asks it or changes it.

    >>> layer.weight, layer.in_features               # the effective tensor, and what the module says
    >>> layer.stride                                  # of a convolution: the module's
    >>> layer.bias = None                             # ... is set on the module

So code that reads a child's weight trains what it should, and code that changes a module changes the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn

from .effective_tensors import LayerWithEffectiveTensors
from .same_class import inside_of


# Attributes of the wrapper that are those of the module.
OF_MODULE = ("weight", "bias", "in_features", "out_features")
# accelerate puts these on a module for which it replaces `forward`: each module has its own, or none.
OF_ACCELERATE = ("_hf_hook", "_old_forward")


class StandIn(LayerWithEffectiveTensors):
    """The part of a [`GreenTrainerLayer`] that forwards attributes to the module, and from it."""

    _stands_for: tuple[type, type]  # the wrapper's own class, and that of the module: see `same_class`

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self._attribute("weight"))

    @property
    def bias(self) -> Tensor:
        return cast(Tensor, self._attribute("bias"))

    @property
    def in_features(self) -> int | None:
        return self._features("in_features", "nx")

    @property
    def out_features(self) -> int | None:
        return self._features("out_features", "nf")

    def _features(self, name: str, name_in_conv1d: str) -> int | None:
        """None where features mean nothing: peft asks every tuner layer for them."""
        if hasattr(self.base_layer, name):
            return cast(int, self._attribute(name))
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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.base_layer.register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
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

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        return "greentrainer." + super().__repr__()
