"""GreenTrainerLayer: runs a module with trained values in place of some of its own tensors.

    >>> layer = GreenTrainerLayer(nn.Linear(8, 8), "default")
    >>> layer.add_value("default", "weight")          # a trained copy of base_layer.weight
    >>> layer.set_selected("default", {"weight"})     # ... that is being trained
    >>> layer.weight is layer.greentrainer_values["default"]["weight"]
    True

The base tensor stays as it is, frozen. A tensor that was never selected has no value and costs nothing. Each part of the
class has a file of its own: what is held (`layer_values`), what is run (`effective_tensors`), `merging`, and what others see
(`stand_in`).
"""

from __future__ import annotations

from typing import Any, SupportsIndex, cast

import torch
from torch import nn

from ..tensors.names import tensor_of
from .lock import Lock
from .merging import MergeableLayer
from .same_class import new_with_class_of
from .stand_in import StandIn
from .state import Selection, ValuesOfAdapters


class GreenTrainerLayer(StandIn, MergeableLayer):
    """
    Wraps a module that owns floating-point parameters: linear, convolution, embedding, norm, fused experts.

    Reading a tensor from outside (`layer.weight`) gives the effective tensor, so that code which reads a child's weight
    trains what it should.

    Args:
        base_layer (`nn.Module`): The module to wrap.
        adapter_name (`str`): The name of the first adapter.
    """

    adapter_layer_names: tuple[str, ...] = ("greentrainer_values",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.greentrainer_values = ValuesOfAdapters()
        self.selection_of_values = Selection(self.greentrainer_values)
        self.merged_adapters = []
        self._lock = Lock()
        self._tied = {}
        self._float32_values = {}
        self._unmerged = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._read_by_others = set()
        self.add_adapter(adapter_name)
        # From here on what is set on the wrapper is set on the module, but for what the wrapper has.
        self.base_layer = base_layer
        self._modules["greentrainer_values"] = self._modules.pop("greentrainer_values")  # after the module

    def __new__(cls, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> GreenTrainerLayer:
        return cast(GreenTrainerLayer, new_with_class_of(cls, type(base_layer)))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not run that of the module's class, which may keep a register of its subclasses."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made while the program runs, so it cannot be found by its name.
        return new_with_class_of, type(self)._stands_for, self.__dict__

    def delete_adapter(self, adapter_name: str) -> None:
        self._float32_values.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.greentrainer_values:
            return
        for name, value in list(self.greentrainer_values[adapter_name].items()):
            if value.device.type != "meta":
                value.data = value.data.to(device or self.base_tensor(tensor_of(name)).device)


def base_layer_of(module: nn.Module) -> nn.Module:
    """The module itself: what a wrapper has inside, any other as it is."""
    return module.base_layer if isinstance(module, GreenTrainerLayer) else module
