"""Notices tensors that have a gradient and do not move, whatever keeps them from it.

    >>> watch = MovementWatch()
    >>> watch.follow({"model.norm.weight": value}, {"model.norm.weight": optimizer}, {"model.norm.weight": group})
    >>> loss.backward(); optimizer.step()
    >>> watch.take_unmoved()
    {}

A newly selected tensor is new to whatever steps: an optimizer that steps in gradient hooks, or keeps a list of its own, has
no part of it, and nothing tells but that the tensor stays where it is. As its gradient arrives, before any optimizer has seen
it, the entries with the largest one are noted; after the step they are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..measuring.importance import unwrapped, update_rule
from .optimizer_steps import step_count, stepped_since


# So many steps are waited for a first movement of anything that an optimizer has: a scaler skips steps that overflow. And so
# many at a learning rate of zero, as a warm-up begins.
IN_VAIN, WARM_UP = 3, 10
# A gradient that is so much smaller than others is their rounding.
ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Followed:
    value: nn.Parameter
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    node: torch.autograd.graph.Node  # the tensor knows it by a weak reference only
    handle: RemovableHandle


@dataclass(frozen=True)
class _Note:
    """A tensor as its gradient arrived."""

    indices: list[tuple[Tensor, ...]]
    grads: Tensor
    before: Tensor
    accumulated: Tensor | None  # of the gradient before; None: there was none
    lr: float

    @property
    def is_first(self) -> bool:
        """Whether gradients began to accumulate here, because those before were used or thrown away."""
        return self.accumulated is None or not self.accumulated.any()


class MovementWatch:
    """Follows tensors from a selection on, each until it has moved once, or was told of.

    It hangs on the nodes of the graph that accumulate gradients, not on the tensors: so nothing of it is seen there, copied
    or saved with them.
    """

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}
        self._noted: dict[str, _Note] = {}
        self._told: set[str] = set()
        self._in_vain: Counter[int] = Counter()  # steps in which nothing moved, by optimizer
        self._began: set[int] = set()
        self._last_look = step_count()

    def follow(
        self,
        values: Mapping[str, nn.Parameter],
        optimizers: Mapping[str, torch.optim.Optimizer],
        groups: Mapping[str, dict[str, Any]],
    ) -> None:
        """Follow these tensors, which require grad, and no others."""
        self.end()
        for name, value in values.items():
            if name not in self._told:
                with torch.enable_grad():
                    node = torch.autograd.graph.get_gradient_edge(value).node
                handle = node.register_prehook(partial(self._arrived, name))
                self._followed[name] = _Followed(value, unwrapped(optimizers[name]), groups[name], node, handle)

    def end(self) -> None:
        """Follow none any longer."""
        for name in list(self._followed):
            self._drop(name)
        self._noted.clear()

    def _drop(self, name: str) -> None:
        self._followed.pop(name).handle.remove()

    def _arrived(self, name: str, arrived: tuple[Tensor | None, ...]) -> None:
        grad = arrived[0]
        if grad is None or name in self._noted:
            return
        value, indices = self._followed[name].value, _largest(grad)
        if indices:
            grads = _entries(grad.to_dense() if grad.is_sparse else grad, indices)
            before = _entries(value.detach(), indices)
            # Gradients that are zeroed in place are as good as none.
            accumulated = None if value.grad is None or value.grad.is_sparse else _entries(value.grad, indices)
            self._noted[name] = _Note(
                indices, grads, before, accumulated, float(self._followed[name].group["lr"] or 0.0)
            )

    def take_unmoved(self) -> dict[str, str]:
        """After a step: which tensors did not move although they should have, each told of once, and why that may be."""
        stepped, self._last_look = stepped_since(self._last_look), step_count()
        noted, self._noted = self._noted, {}
        grads = {name: note.grads.abs().max().item() for name, note in noted.items()}
        if not all(map(math.isfinite, grads.values())):  # a scaler leaves the step out
            return {}
        after = {name: _entries(self._followed[name].value.detach(), note.indices) for name, note in noted.items()}
        moved = {name for name, note in noted.items() if (after[name] != note.before).any()}
        rounding = ROUNDING * max(grads.values(), default=0.0)
        still = [
            n for n in noted if n not in moved and grads[n] > rounding and self._is_visible(n, noted[n], grads[n])
        ]
        still_by_optimizer: dict[int, list[str]] = {}
        for name in still:
            still_by_optimizer.setdefault(id(self._followed[name].optimizer), []).append(name)

        who_stepped = {id(optimizer) for optimizer in stepped}
        who_moved = {id(self._followed[name].optimizer) for name in moved}
        found = []
        for optimizer, names in still_by_optimizer.items():
            if optimizer in who_moved:
                found += names
                continue
            # Where no step was seen, gradients that were thrown away tell of one. They may still be accumulating.
            thrown_away = optimizer in self._began and all(noted[name].is_first for name in names)
            self._began.add(optimizer)
            self._in_vain[optimizer] += thrown_away or optimizer in who_stepped
            if self._in_vain[optimizer] >= (IN_VAIN if any(noted[name].lr for name in names) else WARM_UP):
                found += names
        for optimizer in who_moved:
            self._in_vain[optimizer] = 0
        told = {name: self._why(name, noted[name]) for name in found}
        self._told.update(told)
        for name in moved.union(told):
            self._drop(name)
        return told

    def _is_visible(self, name: str, note: _Note, grad: float) -> bool:
        """Whether a step changes the tensor at all, as it does not at the end of a schedule; half precision is to blame."""
        step = note.lr * (grad if update_rule(self._followed[name].optimizer) == "sgd" else 1.0)
        resolution = torch.finfo(note.before.dtype).eps * note.before.abs().max().item()
        return step == 0 or step >= resolution or note.before.dtype.itemsize < 4

    def _why(self, name: str, note: _Note) -> str:
        if not note.lr:
            return "the learning rate of their group is 0"
        if note.before.dtype.itemsize < 4:
            dtype = str(note.before.dtype).removeprefix("torch.")
            return f"values in {dtype} are too coarse for a learning rate of {note.lr:g}: keep them in float32"
        return (
            "nothing steps them: an optimizer that steps in gradient hooks, or in a list of its own, was given the tensors "
            "of an earlier selection only; call the step() of the optimizer that is handed over"
        )


def _largest(grad: Tensor) -> list[tuple[Tensor, ...]]:
    """Where the largest and the smallest entry of a gradient are. No copy of it is made."""
    rows = None
    if grad.is_sparse:  # the rows of an nn.Embedding(sparse=True) that the batch used
        grad = grad.coalesce()
        rows, grad = grad.indices()[0], grad.values()
    if not grad.numel():
        return []
    found = [torch.unravel_index(i, grad.shape) if grad.dim() else () for i in (grad.argmax(), grad.argmin())]
    return found if rows is None else [(rows[row], *rest) for row, *rest in found]


def _entries(tensor: Tensor, indices: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([tensor[index] for index in indices])
