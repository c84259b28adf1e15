"""The values of one adapter in one module, and what a state dict says of them beside the tensors themselves.

    >>> values = Values()
    >>> values.note_selected({"weight"}, provisional=False)
    >>> values.get_extra_state()          # `<module>.greentrainer_values.<adapter>._extra_state` of a state dict
    tensor([123,  34, ...], dtype=torch.uint8)

The set of values changes while a model is trained, so a state dict tells more than numbers: the keys of a state that has
this tensor are all the values there are, and it says which of them are being trained. peft's files do not have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


EXTRA = "_extra_state"


class Values(nn.ParameterDict):
    """The values of one adapter in one module, by name.

    Attributes:
        selected_candidates: those that are being trained.
        is_provisional: whether that was decided from sizes alone.
        just_loaded: whether all may require grad until the first pass, since an optimizer's state is loaded by position.
    """

    def __init__(self) -> None:
        super().__init__()
        self.note_selected(frozenset(), provisional=False)

    def note_selected(self, candidates: Iterable[str], provisional: bool) -> None:
        self.selected_candidates, self.is_provisional, self.just_loaded = frozenset(candidates), provisional, False

    def get_extra_state(self) -> Tensor:
        # safetensors takes tensors only.
        told = json.dumps({"selected": sorted(self.selected_candidates), "provisional": self.is_provisional})
        return torch.tensor(list(told.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        # Whoever casts or averages a state does so with all of its tensors.
        told = json.loads(bytes(state.float().round().int().tolist()))
        self.note_selected(told["selected"], told["provisional"])
        self.just_loaded = True

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + EXTRA in missing_keys:  # peft's files hold values only, and so do states of what is trained
            missing_keys.remove(prefix + EXTRA)
