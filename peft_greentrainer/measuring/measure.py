"""What a probe takes from each gradient: the importance of the candidates that it tells about.

    >>> measure = SameBatch("adam", rates={})                           # the paper's, for whole tensors
    >>> measure("norm.weight", grad)
    {'norm.weight': tensor(0.0421)}
    >>> measure = CrossBatch("adam", rates={}, candidates={"norm.weight", "q.weight_low_rank"})
    >>> measure("q.weight_low_rank_B", grad_on_one_batch)               # nothing to judge yet
    {'q.weight_low_rank': tensor(0.)}
    >>> measure("q.weight_low_rank_B", grad_on_another)
    {'q.weight_low_rank': tensor(0.0031)}

Between forms of a tensor only a comparison across batches is fair. On the batch that it was made from, an update also fits
the noise of that batch, and the more weights it has the more: of what is predicted there, less than a quarter is left on
another batch, and for whole tensors less than for low-rank updates.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..tensors.names import candidate_of, tensor_of
from .importance import UpdateRule, importance, sum_type


# So many evenly spread entries of a tensor stand for it, or what is kept between batches would be as large as the model.
SAMPLE = 2**15


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
