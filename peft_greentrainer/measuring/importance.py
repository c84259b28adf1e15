"""What a gradient tells: by how much its tensor's next update would lower the loss.

    >>> importance(grad, "adam", lr=1e-3)             # grad: any shape -> a float32 scalar tensor
    tensor(0.0421)
    >>> measure = SameBatch("adam", rates={})         # the paper's, for whole tensors
    >>> measure("norm.weight", grad)
    {'norm.weight': tensor(0.0421)}
    >>> measure = CrossBatch("adam", rates={}, candidates={"norm.weight", "q.weight_low_rank"})
    >>> measure("q.weight_low_rank_B", grad_on_one_batch)               # nothing to judge yet
    {'q.weight_low_rank': tensor(0.)}
    >>> measure("q.weight_low_rank_B", grad_on_another)
    {'q.weight_low_rank': tensor(0.0031)}

To first order an update `dW` changes the loss by `sum(dW * dL/dW)`; its negative is the importance of the tensor (the
paper, section 3.2). The paper makes the update and computes the gradient again; the first update that the optimizer
would make is known in closed form, so one pass is enough and no weight is touched.

Between forms of a tensor only a comparison across batches is fair. On the batch that it was made from, an update also fits
the noise of that batch, and the more weights it has the more: of what is predicted there, less than a quarter is left on
another batch, and for whole tensors less than for low-rank updates.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..tensors.names import candidate_of, tensor_of


UpdateRule = Literal["adam", "sgd"]

# So many entries are read at a time: they are converted to float64, and no copy of the gradient is made.
PIECE = 2**20
# So many evenly spread entries of a tensor stand for it, or what is kept between batches would be as large as the model.
SAMPLE = 2**15


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
    drop = torch.zeros((), dtype=sum_type(grad.device), device=grad.device)
    for piece in grad.split(length, dim):
        drop += torch.linalg.vector_norm(piece, power, dtype=drop.dtype) ** power
    return (lr * drop).to(dtype or torch.promote_types(grad.dtype, torch.float32))


def sum_type(device: torch.device) -> torch.dtype:
    """The type in which sums over a gradient are taken: float64, where the device has it.

    In float32 a sum over millions of entries is off by a percent, and squares of entries under 1e-22 are lost.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Measure(Protocol):
    """Gives the importance of candidates by the gradient of a parameter, scalars of the `sum_type` by name."""

    def __call__(self, name: str, grad: Tensor) -> dict[str, Tensor]: ...

    def reset(self) -> None:
        """Forget what was kept."""

    def state_dict(self) -> dict[str, str]:
        """What is kept, as JSON."""

    def load_state_dict(self, state: Mapping[str, str]) -> None: ...


class SameBatch:
    """The paper's: the drop of the loss on the batch from which the update is made.

    Args:
        rule: see `update_rule`.
        rates: the learning rate by tensor; 1 where it is not given, since only proportions matter.
        rules: the rule by tensor, where it is not `rule`: several optimizers have one each.
    """

    def __init__(
        self, rule: UpdateRule, rates: Mapping[str, float], rules: Mapping[str, UpdateRule] = MappingProxyType({})
    ) -> None:
        self.rule = rule
        self.rates = rates
        self.rules = rules

    def __call__(self, name: str, grad: Tensor) -> dict[str, Tensor]:
        rule, lr = self.rules.get(name, self.rule), self.rates.get(name, 1.0)
        return {name: importance(grad, rule, lr, sum_type(grad.device))}

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, str]:
        return {}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        pass


class CrossBatch:
    """The drop of the loss on one batch from the update that the batch before would have made: `lr * sum(sign(g) * g')`.

    It is negative where two batches disagree. That of a low-rank form is the sum over its factors.

    Args:
        rule: see `update_rule`.
        rates: the learning rate by tensor; 1 where it is not given.
        candidates: what may be trained; other gradients tell nothing.
        rules: the rule by tensor, where it is not `rule`.
    """

    def __init__(
        self,
        rule: UpdateRule,
        rates: Mapping[str, float],
        candidates: Set[str],
        rules: Mapping[str, UpdateRule] = MappingProxyType({}),
    ) -> None:
        self.rule = rule
        self.rates = rates
        self.rules = rules
        self.candidates = candidates
        self._updates: dict[str, Tensor] = {}

    def __call__(self, name: str, grad: Tensor) -> dict[str, Tensor]:
        candidate = candidate_of(name)
        if candidate not in self.candidates:
            return {}
        lr = self.rates.get(tensor_of(candidate), 1.0)
        return {candidate: lr * self._judged(name, grad.to_dense() if grad.is_sparse else grad)}

    def _judged(self, name: str, grad: Tensor) -> Tensor:
        entries = grad.reshape(-1)
        at = torch.linspace(0, len(entries) - 1, SAMPLE, dtype=torch.float64, device=grad.device).long()
        sample = (entries if len(entries) <= SAMPLE else entries[at]).to(sum_type(grad.device))
        update = self._updates.get(name)
        dtype = self._dtype(name)
        self._updates[name] = (sample.sign() if dtype == torch.int8 else sample).to(dtype)
        if update is None:
            return sample.new_zeros(())
        return (update.to(sample.device) * sample).sum() * (len(entries) / len(sample))

    def reset(self) -> None:
        self._updates = {}

    def state_dict(self) -> dict[str, str]:
        return {name: _encoded(update) for name, update in self._updates.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self._updates = {name: _decoded(text, self._dtype(name)) for name, text in state.items()}

    def _dtype(self, name: str) -> torch.dtype:
        """What an update is kept in: Adam's is a sign."""
        return torch.int8 if self.rules.get(tensor_of(name), self.rule) == "adam" else torch.bfloat16


def _encoded(tensor: Tensor) -> str:
    return base64.b64encode(zlib.compress(tensor.cpu().view(torch.uint8).numpy().tobytes(), 1)).decode()


def _decoded(text: str, dtype: torch.dtype) -> Tensor:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return torch.from_numpy(raw.copy()).view(dtype)
