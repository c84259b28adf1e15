"""By how much would a tensor's next update lower the loss?

    >>> update_rule(torch.optim.AdamW(parameters))
    'adam'
    >>> importance(grad, "adam", lr=1e-3)             # grad: any shape -> a float32 scalar tensor
    tensor(0.0421)

To first order an update `dW` changes the loss by `sum(dW * dL/dW)`; its negative is the importance of the tensor (the
paper, section 3.2). The paper makes the update and computes the gradient again; the first update that the optimizer
would make is known in closed form, so one pass is enough and no weight is touched.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


UpdateRule = Literal["adam", "sgd"]

# So many entries are read at a time: they are converted to float64, and no copy of the gradient is made.
PIECE = 2**20


def update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The rule by which importance is computed for this optimizer: `"sgd"` for SGD, `"adam"` for every other.

    Adam and its kin move a weight that has no moments yet by `lr * sign(grad)`. The moments of tensors that were
    trained before are left out on purpose: one rule for all, or what was not trained yet would always win.
    """
    return "sgd" if isinstance(unwrapped(optimizer), torch.optim.SGD) else "adam"


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the rule is the optimizer's own: for SGD, and for Adam and its kin by name (`AdamW8bit`, `PagedAdamW`)."""
    names = [cls.__name__.lower() for cls in type(unwrapped(optimizer)).__mro__]
    return any("adam" in name or name == "sgd" for name in names)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """accelerate wraps the optimizer in a class of its own."""
    return getattr(optimizer, "optimizer", optimizer)


def importance(grad: Tensor, rule: UpdateRule, lr: float, dtype: torch.dtype | None = None) -> Tensor:
    """The predicted drop of the loss from the first update of a tensor with this gradient.

        >>> importance(torch.tensor([3.0, -4.0]), "adam", lr=0.1)     # lr * sum(|g|)
        tensor(0.7000)
        >>> importance(torch.tensor([3.0, -4.0]), "sgd", lr=0.1)      # lr * sum(g^2)
        tensor(2.5000)

    Args:
        grad: the gradient, of any shape and floating-point type. It is read once and not copied.
        rule: see `update_rule`.
        lr: learning rate of the tensor's parameter group.
        dtype: the type of the result; default: float32, or that of the gradient where it is wider.

    Returns:
        A scalar on the gradient's device. It is not finite where the gradient is not.
    """
    if grad.is_sparse:  # the rows of an nn.Embedding(sparse=True) that the batch used
        grad = grad.coalesce().values()
    grad = torch.atleast_1d(grad)
    # Along the dimension in which entries lie furthest apart, so that a piece lies together.
    dim = max(range(grad.dim()), key=grad.stride)
    length = max(1, PIECE * grad.shape[dim] // max(1, grad.numel()))
    power = 2 if rule == "sgd" else 1
    norms = [torch.linalg.vector_norm(p, power, dtype=sum_type(grad.device)) for p in grad.split(length, dim)]
    return (lr * sum(norm**power for norm in norms)).to(dtype or torch.promote_types(grad.dtype, torch.float32))


def sum_type(device: torch.device) -> torch.dtype:
    """The type in which sums over a gradient are taken: float64, where the device has it.

    In float32 a sum over millions of entries is off by a percent, and squares of entries under 1e-22 are lost.
    """
    return torch.float32 if device.type == "mps" else torch.float64
