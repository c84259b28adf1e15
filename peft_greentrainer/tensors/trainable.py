"""Which tensors a training step can change at all.

>>> can_be_trained(nn.Linear(2, 2).weight), can_be_trained(torch.ones(2, dtype=torch.int8))
(True, False)
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def can_be_trained(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, and holds them itself: quantized ones and empty ones do not.

    A quantized tensor is of integers (bitsandbytes), of 8-bit floats, or only looks like one of floats (torchao).
    """
    holds_floats = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    stands_for_others = is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)
    return holds_floats and not stands_for_others and tensor.numel() > 0
