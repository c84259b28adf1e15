"""What cannot be trained in a model: refused by name, or said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from .config import GreenTrainerConfig
from .delta import kind_of
from .layer import GreenTrainerLayer
from .trainable import can_be_trained


def refuse_offloaded(model: nn.Module, keys: Iterable[str]) -> None:
    for key in keys:
        if getattr(getattr(model.get_submodule(key), "_hf_hook", None), "offload", False):
            raise ValueError(
                f"The weights of {key} are offloaded by accelerate, which puts them in place for each forward pass and so "
                "over the trained ones. Load the base model without 'cpu' or 'disk' in its device_map."
            )


def refuse_wrapped_heads(model: nn.Module, config: GreenTrainerConfig) -> None:
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer) and any(key.endswith(name) for name in config.modules_to_save or ()):
            raise ValueError(
                f"modules_to_save names {key}, whose tensors are candidates of an earlier adapter. Add the adapter with "
                "modules_to_save first, or give the earlier one exclude_modules."
            )


def tell_of_left_out(reasons: Iterable[str]) -> None:
    if reasons := list(reasons):
        warnings.warn(
            f"{len(reasons)} tensors are no candidates for what they are called, the first of them {reasons[0]}. Rename it to "
            "train it.",
            stacklevel=2,
        )


def tell_of_quantized(model: nn.Module, candidates: Iterable[str]) -> None:
    parameters = dict(model.named_parameters())
    quantized = [name for name, parameter in parameters.items() if parameter.numel() and not can_be_trained(parameter)]
    if quantized:
        kinds = list(dict.fromkeys(map(kind_of, candidates)))
        warnings.warn(
            f"{len(quantized)} of {len(parameters)} tensors of this model are quantized and cannot be trained; gradients "
            f"that pass through them cost as much as ever. Left to train: {', '.join(kinds)}.",
            stacklevel=2,
        )
