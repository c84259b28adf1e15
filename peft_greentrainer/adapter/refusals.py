"""What cannot be trained in a model: refused by name, or said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..tensors.names import base_name, kind_of
from ..tensors.trainable import can_be_trained
from .candidates import Candidates
from .config import GreenTrainerConfig
from .layer import GreenTrainerLayer
from .model_tensors import ModelTensors, named_modules


# What peft puts in place of modules: inside, adapters have their names.
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def refuse_offloaded(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise `ValueError` if accelerate moves the weights of one of these modules in and out."""
    modules = named_modules(model)
    for key in keys:
        if getattr(getattr(modules[key], "_hf_hook", None), "offload", False):
            raise ValueError(
                f"The weights of {key} are offloaded by accelerate, which puts them in place for each forward pass and so "
                "over the trained ones. Load the base model without 'cpu' or 'disk' in its device_map."
            )


def refuse_wrapped_heads(model: nn.Module, config: GreenTrainerConfig) -> None:
    """Raise `ValueError` if a module to save was wrapped for an earlier adapter."""
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer) and any(key.endswith(name) for name in config.modules_to_save or ()):
            raise ValueError(
                f"modules_to_save names {key}, whose tensors are candidates of an earlier adapter. Add the adapter with "
                "modules_to_save first, or give the earlier one exclude_modules."
            )


def refuse_names_of_modules(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Raise `ValueError` if one of several adapters has the name of a module: peft leaves that module out of files of others."""
    modules = named_modules(model)
    wrappers = [f"{name}." for name, module in modules.items() if isinstance(module, WRAPPERS)]
    own = [name for name in modules if not any(name.startswith(wrapper) for wrapper in wrappers)]
    parts = {part for name in own for part in name.split(".")}
    taken = sorted(parts.intersection(adapter_names)) if len(adapter_names) > 1 else []
    if taken:
        raise ValueError(
            f"An adapter is called {taken[0]!r}, as a module of this model is, and peft would leave what other adapters have of "
            "that module out of their files. Give the adapter another name."
        )


def tell_of_left_out(reasons: Iterable[str]) -> None:
    """Warn of tensors that are no candidates for what they are called."""
    if reasons := list(reasons):
        warnings.warn(
            f"{len(reasons)} tensors are no candidates for what they are called, the first of them {reasons[0]}. Rename it to "
            "train it.",
            stacklevel=2,
        )


def refuse_replaced(candidates: Iterable[str], wrappers: Mapping[str, GreenTrainerLayer]) -> None:
    """Raise `ValueError` if a module of a candidate is none of the wrappers, which it was when the adapter was added."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in candidates)
    replaced = [module for module in modules if module not in wrappers]
    if replaced:
        raise ValueError(
            f"{', '.join(replaced[:3])}: another module was put in place of one that an adapter had wrapped, and what was "
            "trained of that one is lost. Change the base model before you call get_peft_model or add_adapter; if something "
            "was trained already, call merge_and_unload first."
        )


def tell_of_quantized(model: nn.Module, candidates: Iterable[str]) -> None:
    """Warn where tensors of the model are quantized, with the kinds of candidates that are left."""
    parameters = dict(model.named_parameters())
    quantized = [name for name, parameter in parameters.items() if parameter.numel() and not can_be_trained(parameter)]
    if quantized:
        kinds = list(dict.fromkeys(map(kind_of, candidates)))
        warnings.warn(
            f"{len(quantized)} of {len(parameters)} tensors of this model are quantized and cannot be trained; gradients "
            f"that pass through them cost as much as ever. Left to train: {', '.join(kinds)}.",
            stacklevel=2,
        )


def frozen_before(model: nn.Module, found: ModelTensors, configs: Iterable[PeftConfig]) -> list[str] | None:
    """The tensors that did not require grad before the model was wrapped, where others did.

    A model that is frozen as a whole says nothing of its parts. Where peft has wrapped it already, all of its base is frozen:
    what an earlier adapter says counts then.

    Args:
        model: the base model.
        found: its tensors.
        configs: those of all adapters of the model.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return next(filter(None, (getattr(config, "frozen", None) for config in configs)), None)
    requires_grad = {base_name(name): p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    if not any(requires_grad.values()):
        return None
    return [tensor.name for tensor in found.tensors if not requires_grad[tensor.name]] or None


def tell_of_frozen(found: ModelTensors, config: GreenTrainerConfig) -> None:
    """Warn of what was frozen before the model was wrapped: where it is no candidate, and where it is one all the same."""
    without = copy.copy(config)
    without.frozen = None
    named = Candidates.of(found, without).tied
    frozen = [name for name in config.frozen or () if name in named]
    if not frozen:
        return
    kinds = ", ".join(dict.fromkeys(map(kind_of, frozen)))
    before = f"{len(frozen)} tensors did not require grad before the model was wrapped"
    if config.target_modules is not None:
        message = (
            f"{before}, and are candidates all the same, since target_modules names them: {kinds}. Name those that are to "
            "stay as they are in exclude_modules."
        )
    elif len(frozen) == len(named):
        message = (
            f"{before}, and are candidates all the same, since without them there are none: {kinds}. Name those that are "
            "to stay as they are in exclude_modules."
        )
    else:
        message = (
            f"{before}, by what you or the model's own code set, and so are no candidates: {kinds}. To have them trained "
            "too, call requires_grad_(True) on them before wrapping, or give target_modules, which may name them."
        )
    warnings.warn(message, stacklevel=2)
