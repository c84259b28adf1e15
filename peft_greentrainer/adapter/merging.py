"""Merging writes effective tensors into the base tensors, exactly; unmerging puts the base tensors back, bit for bit.

>>> layer.merge(adapter_names=["default"])
>>> layer.merged_adapters
['default']
>>> layer.unmerge()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from .effective_tensors import LayerWithEffectiveTensors


class MergeableLayer(LayerWithEffectiveTensors):
    """The part of a [`GreenTrainerLayer`] that merges."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective values into the base tensors, exactly.

        Args:
            safe_merge (`bool`): Refuse values that are not finite, before anything is written.
            adapter_names (`list[str]`, *optional*): The adapters to merge; default: the active ones.

        Raises:
            ValueError: with `safe_merge`, a value is not finite.
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

    def refuse_broken(self, adapter_names: list[str] | None) -> None:
        """Raise `ValueError` if an adapter (default: an active one) has a value that is not finite."""
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            if adapter not in self.greentrainer_values:
                continue
            for tensor, value in self.greentrainer_values[adapter].items():
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeableLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._unmerged = {tensor: fn(base) for tensor, base in self._unmerged.items()}
        return self
