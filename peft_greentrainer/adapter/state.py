"""The values of an adapter in a module, and what a state dict says of them beside the tensors themselves.

    >>> values = ValuesOfAdapters({"default": Values()})
    >>> values["default"].note_selected({"weight"}, provisional=False)
    >>> Selection(values).get_extra_state()          # `<module>.selection_of_values._extra_state` of a state dict
    tensor([123,  34, ...], dtype=torch.uint8)

The set of values changes while a model is trained, so a state dict tells more than numbers: of the adapters that this
tensor names, the keys of the state are all the values there are, and it says which of them are being trained. peft's files
do not have it, and its name has nothing by which peft and transformers know what they want to find in a file.
"""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterable, ValuesView
from typing import Any, cast

import torch
from torch import Tensor, nn


EXTRA_STATE = "selection_of_values._extra_state"


class Values(nn.ParameterDict):
    """The values of one adapter in one module, by name, whatever the tensors are called: `keys` and `values` too.

    What is selected is decided here and nowhere else: `requires_grad` and the adapter's config follow from it.

    Attributes:
        selected_candidates: those that are being trained.
        is_provisional: whether that was decided from sizes alone.
        just_loaded: whether all may require grad until the first pass, since an optimizer's state is loaded by position.
        awaits_file: whether the adapter was made from a saved one, whose values are still to be loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.awaits_file = False
        self.note_selected(frozenset(), provisional=False)

    def __getitem__(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[name])

    def __setitem__(self, name: str, value: nn.Parameter) -> None:
        self._keys[name] = None
        self._parameters.setdefault(name, None)
        self.register_parameter(name, value)

    def note_selected(self, candidates: Iterable[str], provisional: bool) -> None:
        """Take these candidates for those that are being trained."""
        self.selected_candidates, self.is_provisional, self.just_loaded = frozenset(candidates), provisional, False


class ValuesOfAdapters(nn.ModuleDict):
    """The values in one module, by the name of the adapter."""

    def __getitem__(self, adapter_name: str) -> Values:
        return cast(Values, super().__getitem__(adapter_name))

    def items(self) -> ItemsView[str, Values]:
        return cast(ItemsView[str, Values], super().items())

    def values(self) -> ValuesView[Values]:
        return cast(ValuesView[Values], super().values())


class Selection(nn.Module):
    """Carries in a state dict which values of a module are being trained. It has no parameters."""

    of_adapters: ValuesOfAdapters

    def __init__(self, of_adapters: ValuesOfAdapters) -> None:
        super().__init__()
        self.__dict__["of_adapters"] = of_adapters  # a part of the wrapper, not of this

    def get_extra_state(self) -> Tensor:
        told = {
            adapter: {"selected": sorted(values.selected_candidates), "provisional": values.is_provisional}
            for adapter, values in self.of_adapters.items()
        }
        # safetensors takes tensors only.
        return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        for adapter, told in read(state).items():
            if adapter in self.of_adapters:
                self.of_adapters[adapter].note_selected(told["selected"], told["provisional"])
                self.of_adapters[adapter].just_loaded = True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = list(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = before  # peft's files hold values only, and so do states of what is trained


def read(state: Tensor) -> dict[str, dict[str, Any]]:
    """What an extra state says of each adapter."""
    # Whoever casts or averages a state does so with all of its tensors.
    told: dict[str, dict[str, Any]] = json.loads(bytes(state.float().round().int().tolist()))
    return told
