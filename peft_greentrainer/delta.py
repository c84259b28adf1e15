"""The delta file: which entry belongs to which tensor, and whether it was made from this base.

    >>> tensor_of_key("base_model.model.model.norm.greentrainer_values.weight")
    'model.norm.weight'
    >>> fingerprint(torch.ones(4, 2))
    {'shape': [4, 2], 'dtype': 'float32', 'samples': [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}

`adapter_model.safetensors` holds the trained values themselves, in their own type: a value that is loaded is the value
that was trained, bit for bit, which a difference in float32 could not promise. The rest is in `adapter_config.json`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


VALUES = ".greentrainer_values."
SAMPLES = 8
# A half-precision copy of the same base differs from it by less than this share of a value.
HALF_PRECISION = 2**-7


def tensor_of_key(key: str) -> str:
    """The base-model name of the tensor that an entry of the file holds the value of."""
    module, _, tensor = key.removeprefix("base_model.model.").partition(VALUES)
    return f"{module}.{tensor}"


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Shape, type and a few evenly spaced values of a base tensor, as JSON."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "samples": flat[index.to(flat.device)].double().tolist(),
    }


def check_fingerprint(name: str, expected: dict[str, Any], tensor: Tensor) -> None:
    """Raise `ValueError` unless `tensor` is the base tensor that this fingerprint was taken of.

    A half-precision copy of it gives a warning.
    """
    if list(tensor.shape) != expected["shape"]:
        raise ValueError(
            f"This delta was made for a base whose {name} has the shape {expected['shape']}; this one's is "
            f"{list(tensor.shape)}. Load it onto the base model that it was trained on."
        )
    if tensor.device.type == "meta":
        return
    found = fingerprint(tensor)
    samples, other = (torch.tensor(f["samples"], dtype=torch.float64) for f in (expected, found))
    tolerance = 1e-6 if found["dtype"] == expected["dtype"] else HALF_PRECISION
    if not torch.allclose(samples, other, rtol=tolerance, atol=1e-7, equal_nan=True):
        raise ValueError(
            f"This delta was made for another base: {name} holds {samples[:3].tolist()} ... there and "
            f"{other[:3].tolist()} ... here. Load it onto the base model that it was trained on."
        )
    if found["dtype"] != expected["dtype"]:
        warnings.warn(
            f"This delta was trained on a {expected['dtype']} base and is loaded onto the same weights in "
            f"{found['dtype']}: outputs will differ by the rounding of what was not trained.",
            stacklevel=2,
        )
