"""Which tensors an optimizer accepts at all: Muon those of two dimensions, SparseAdam those with sparse gradients.

    >>> muon = torch.optim.Muon([nn.Parameter(torch.ones(4, 4))])
    >>> kinds = [TensorKind.from_tensor(torch.ones(shape)) for shape in ((8, 2), (8,))]
    >>> [accepts(muon, muon.param_groups[0], kind) for kind in kinds]
    [True, False]

No attribute of an optimizer tells. So another optimizer of the same class and options is made for a tiny tensor of that
kind, and takes a step: what it does not accept, it refuses in the one or in the other.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


# What users and other libraries write into a group, and no optimizer has as an option.
NOT_OPTIONS = ("params", "param_names", "initial_lr")


@dataclass(frozen=True)
class TensorKind:
    """All that an optimizer can ask of a tensor, but for its size."""

    dimensions: int
    dtype: torch.dtype
    device: torch.device
    sparse: bool = False

    @classmethod
    def from_tensor(cls, tensor: Tensor, sparse: bool = False) -> TensorKind:
        return cls(tensor.dim(), tensor.dtype, tensor.device, sparse)


def accepts(optimizer: torch.optim.Optimizer, group: dict[str, Any], kind: TensorKind) -> bool:
    """Whether a tensor of this kind can be added to the group and be stepped there."""
    if _can_step(optimizer, group, kind):
        return True
    others = [replace(kind, dimensions=n, sparse=sparse) for n in (1, 2, 3, 4) for sparse in (False, True)]
    if any(_can_step(optimizer, group, other) for other in others):
        return False
    # It cannot be tried: its step wants a closure, or its defaults are not its arguments. A group whose members are alike
    # beside other groups (a flag says which are Muon's) is taken to be for such tensors only.
    dimensions = {parameter.dim() for parameter in group["params"]}
    return len(optimizer.param_groups) == 1 or len(dimensions) != 1 or kind.dimensions in dimensions


def _can_step(optimizer: torch.optim.Optimizer, group: dict[str, Any], kind: TensorKind) -> bool:
    tensor = nn.Parameter(torch.zeros([2] * kind.dimensions, dtype=kind.dtype, device=kind.device))
    tensor.grad = torch.ones_like(tensor)
    if kind.sparse:
        tensor.grad = tensor.grad.to_sparse(min(1, kind.dimensions))
    options = {name: value for name, value in group.items() if name not in NOT_OPTIONS}
    # AdamW has a default that is none of its arguments.
    arguments = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in arguments}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            type(optimizer)([{"params": [tensor], **options}], **defaults).step()
    except Exception:  # whatever the class raises; what it means is for the caller to find out
        return False
    return True
