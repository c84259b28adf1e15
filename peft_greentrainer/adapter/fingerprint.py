"""Whether a delta was made from this base: a fingerprint of every base tensor that it changes.

>>> fingerprint(torch.ones(4, 2))
{'shape': [4, 2], 'dtype': 'float32', 'samples': [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 'tied': []}
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


SAMPLES = 8
# A half-precision copy of the same base differs from it by less than this share of a value.
HALF_PRECISION = 2**-7
ELSEWHERE = "Load it onto the base model that it was trained on."


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
