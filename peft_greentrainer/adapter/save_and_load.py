"""An adapter that is saved, loaded, and loaded again: what peft asks for, and what follows from what was loaded.

    >>> follow_layers(base)                           # after base.load_state_dict(...): the configs say what is there now

A file, and a state of the whole model, may have other values than the adapter has: those that are not in it are dropped.
Where a state is loaded over values that were there, all of them may require grad until the first pass: an optimizer's state is
loaded by position, and what was deselected has a place too.
"""

from __future__ import annotations

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..tensors.names import PREFIX, base_name, candidates_in
from .provisional import warn_if_never_selected
from .state import EXTRA_STATE
from .values import (
    config_of,
    follow_selection,
    held_candidates,
    layers,
    layers_with,
    refuse_strangers,
    set_selection,
    set_values,
)


class SavedTuner(BaseTuner):
    """The part of the tuner that saves and loads."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return base_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        follow_layers(_base_of(model))
        warn_if_never_selected(model, adapter_name)
        # From peft's own copy, out of which it takes embeddings and modules_to_save afterwards.
        for key in [key for key in state_dict if key.endswith(f".{EXTRA_STATE}")]:
            del state_dict[key]
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        base = _base_of(model)
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        in_file = set(candidates_in((key.removeprefix(prefix) for key in state_dict), layers(base).keys()))
        awaited = _stop_waiting_for_file(base, adapter_name)
        if in_file != set(config_of(base, adapter_name).tensors or {}):  # the selection has changed since it was saved
            set_values(base, adapter_name, in_file)
            set_selection(base, adapter_name, in_file)
        elif not awaited:
            _let_all_require_grad(base, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def wait_for_file(model: nn.Module, adapter_name: str) -> None:
    """Note that the values of an adapter, which was made from a saved one, are still to be loaded: the first time."""
    for layer in layers_with(model, adapter_name).values():
        layer.greentrainer_values[adapter_name].awaits_file = True


def _stop_waiting_for_file(model: nn.Module, adapter_name: str) -> bool:
    """Note that the values are being loaded, and say whether this is the first time."""
    of_layers = [layer.greentrainer_values[adapter_name] for layer in layers_with(model, adapter_name).values()]
    awaited = any(values.awaits_file for values in of_layers)
    for values in of_layers:
        values.awaits_file = False
    return awaited


def follow_layers(model: nn.Module) -> None:
    """Let the configs of all adapters follow the layers, into which a state dict may have been loaded.

    Raises:
        ValueError: a state had values of tensors that are no candidates.
    """
    for adapter_name in getattr(model, "peft_config", {}):
        wrappers, config = layers_with(model, adapter_name), config_of(model, adapter_name)
        loaded = any(layer.greentrainer_values[adapter_name].just_loaded for layer in wrappers.values())
        held, selected = held_candidates(wrappers, adapter_name)
        if not wrappers or not loaded and (held, selected) == (set(config.tensors or {}), set(config.selected or [])):
            continue
        refuse_strangers(model, adapter_name, held)
        config.tensors = None  # the base tensors, of which it has fingerprints, may have been loaded too
        if loaded:
            _let_all_require_grad(model, adapter_name)
        else:
            follow_selection(model, adapter_name)


def _let_all_require_grad(model: nn.Module, adapter_name: str) -> None:
    """Let every value require grad until the first pass, where the adapter is active and for training."""
    for layer in layers_with(model, adapter_name).values():
        layer.greentrainer_values[adapter_name].just_loaded = True
    follow_selection(model, adapter_name)


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
