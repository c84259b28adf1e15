"""The delta file: which entry belongs to which tensor, and whether it was made from this base.

    >>> candidate_of_key("base_model.model.model.norm.greentrainer_values.weight", modules={"model.norm"})
    'model.norm.weight'
    >>> fingerprint(torch.ones(4, 2))
    {'shape': [4, 2], 'dtype': 'float32', 'samples': [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 'tied': []}

`adapter_model.safetensors` holds the trained values themselves, in their own type: a value that is loaded is the value
that was trained, bit for bit, which a difference in float32 could not promise. The rest is in `adapter_config.json`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .forms import candidate_of


VALUES = ".greentrainer_values."
# What a `PeftModel` puts before the names of the base model.
PREFIX = "base_model.model."
SAMPLES = 8
# A half-precision copy of the same base differs from it by less than this share of a value.
HALF_PRECISION = 2**-7
ELSEWHERE = "Load it onto the base model that it was trained on."


def without_wrappers(name: str) -> str:
    """A name without what torch.compile and FSDP1 put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def base_name(name: str) -> str:
    """The name of a module or a tensor of it, by its name in a base model that is compiled, whole or in part."""
    return without_wrappers(name)


def kind_of(name: str) -> str:
    """The name without the numbers of layers: model.layers.3.mlp.up_proj.weight -> model.layers.*.mlp.up_proj.weight"""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def candidate_of_key(key: str, modules: Collection[str]) -> str:
    """The candidate that an entry of the file belongs to, by its name in a base model that has these modules.

    A state that was taken from a `PeftModel` has its prefix; but a base may have a `base_model.model` of its own.
    """
    module, _, value = without_wrappers(key).rpartition(VALUES)
    return candidate_of(f"{module if module in modules else module.removeprefix(PREFIX)}.{value}")


def candidates_in(keys: Iterable[str], modules: Collection[str]) -> list[str]:
    """The candidates that have an entry in a file or a state dict, by their names in a base model with these modules."""
    return list(dict.fromkeys(candidate_of_key(key, modules) for key in keys if VALUES in key))


def fingerprint(tensor: Tensor, tied: Sequence[str] = ()) -> dict[str, Any]:
    """Shape, type and a few evenly spaced values of a base tensor, and the other names that it is known by, as JSON.

    On the meta device there are no values.
    """
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    samples = [] if flat.is_meta else flat[index.to(flat.device)].double().tolist()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "samples": samples,
        "tied": sorted(tied),
    }


def check_fingerprint(name: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise `ValueError` unless a base tensor has this fingerprint.

    That of a half-precision copy of it gives a warning.
    """
    if found["shape"] != expected["shape"]:
        raise ValueError(
            f"This delta was made for a base whose {name} has the shape {expected['shape']}; this one's is "
            f"{found['shape']}. {ELSEWHERE}"
        )
    if found["tied"] != expected["tied"]:
        tied, now = (" and ".join(print_["tied"]) or "no other tensor" for print_ in (expected, found))
        raise ValueError(
            f"This delta was made for a base whose {name} is tied to {tied}, and here to {now}. {ELSEWHERE}"
        )
    if not (found["samples"] and expected["samples"]):
        return
    samples, other = (torch.tensor(f["samples"], dtype=torch.float64) for f in (expected, found))
    tolerance = 1e-6 if found["dtype"] == expected["dtype"] else HALF_PRECISION
    alike = torch.isclose(samples, other, rtol=tolerance, atol=1e-7, equal_nan=True)
    # The rows that a resized vocabulary adds are drawn anew each time; they are the last ones.
    if alike.sum() <= SAMPLES // 2:
        raise ValueError(
            f"This delta was made for another base: {name} holds {samples[~alike][:3].tolist()} there and "
            f"{other[~alike][:3].tolist()} here. {ELSEWHERE}"
        )
    if found["dtype"] != expected["dtype"]:
        warnings.warn(
            f"This delta was trained on a {expected['dtype']} base and is loaded onto the same weights in "
            f"{found['dtype']}: outputs will differ by the rounding of what was not trained.",
            stacklevel=2,
        )
