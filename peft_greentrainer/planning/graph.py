"""What does training a set of tensors cost? In FLOPs, or in measured seconds, for any architecture.

    >>> graph = profile(model, batch)                 # one forward and backward pass, recorded
    >>> graph.tensors[:2]                             # in execution order
    ('model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight')
    >>> graph.ratio(graph.tensors[-9:])               # train the last block only
    0.41
    >>> graph.flops(graph.tensors) == graph.full_flops
    True

The ancestors of a tensor's gradient among the operations of a backward pass are what autograd runs when that tensor
is trained, and the cost of a set is the cost of the union. Residual branches, tied embeddings, cross-attention and
experts need no rules of their own (design: the cost graph; the paper, section 3.1, has a table of formulas instead).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ..tensors.names import is_low_rank, tensor_of


@dataclass(frozen=True, eq=False)
class CostGraph:
    """The cost of one training step, as a function of the set of trained tensors: in FLOPs, or in measured seconds.

        >>> graph.flops([])                           # nothing trained: the forward pass
        120000
        >>> graph.flops(["a.weight", "b.bias"])       # forward + what these two gradients need
        250000

    Attributes:
        tensors: the names of the candidate tensors, in execution order.
        forward_cost: of the forward pass, in FLOPs or nanoseconds.
        full_cost: of full fine-tuning, forward included: every parameter that gets a gradient, candidate or not.
        costs: (C,) int64, of each class of backward operations (those needed by the same tensors).
        needs: (N, C) bool, which classes the gradient of each tensor needs.
        unit: "flops" or "seconds"; `ratio`, `floor` and `select` keep to it.
        forced_cost: of the activation gradients that every step computes, whatever is trained, because an activation was
            made to require grad. They are among the needs of every tensor.
        condition: (C,) int64, for operations that run in some steps only: the class on which that depends, else -1.
        runs_if: (C,) bool, whether they run if a trained tensor needs that class (True) or if none does (False).
    """

    tensors: tuple[str, ...]
    forward_cost: int
    full_cost: int
    costs: np.ndarray = field(repr=False)
    needs: np.ndarray = field(repr=False)
    unit: Literal["flops", "seconds"] = "flops"
    forced_cost: int = 0
    condition: np.ndarray | None = field(default=None, repr=False)
    runs_if: np.ndarray | None = field(default=None, repr=False)

    def flops(self, tensors: Iterable[str]) -> int:
        """FLOPs of one training step in which just these tensors are trained, forward included.

        Raises `ValueError` for a name that is not a candidate, and on a graph that was measured in seconds.
        """
        return self._in("flops", self.cost(tensors))

    def seconds(self, tensors: Iterable[str]) -> float:
        """Seconds of one training step in which just these tensors are trained, forward and optimizer included.

        Raises `ValueError` for a name that is not a candidate, and on a graph that counts FLOPs.
        """
        return self._in("seconds", self.cost(tensors)) / 1e9

    def ratio(self, tensors: Iterable[str]) -> float:
        """The share of full fine-tuning that a step with these tensors costs."""
        return self.cost(tensors) / self.full_cost

    def cost(self, tensors: Iterable[str]) -> int:
        """The cost of such a step in FLOPs or nanoseconds."""
        return self.forward_cost + int(
            self._charged(np.logical_or.reduce(self.needs[self.rows(tensors)])) @ self.costs
        )

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass."""
        return self._in("flops", self.forward_cost)

    @property
    def full_flops(self) -> int:
        """FLOPs of a step of full fine-tuning."""
        return self._in("flops", self.full_cost)

    def _in(self, unit: str, cost: int) -> int:
        if self.unit != unit:
            raise ValueError(
                f"This graph is in {self.unit}: profile(model, batch, unit={unit!r}) gives one in {unit}."
            )
        return cost

    @cached_property
    def floor(self) -> float:
        """The smallest ratio that any non-empty selection reaches."""
        return self.ratio([self.tensors[self.cheapest]])

    @cached_property
    def cheapest(self) -> int:
        """The row of the tensor that reaches the floor."""
        return int(np.argmin(self._charged(self.needs) @ self.costs))

    @cached_property
    def dearest_forms(self) -> list[str]:
        """Every tensor once, whole where that is offered."""
        return [name for name in self.tensors if tensor_of(name) == name or tensor_of(name) not in self._row]

    @cached_property
    def bounded_needs(self) -> np.ndarray:
        """(N, C) bool: needs that bound the cost of every set, whatever operations depend on.

        An attention whose bias is not trained runs its fused backward, which costs no less than the matrix products
        that run instead if it is: so everybody pays for the kernel, and those products are the affair of the bias. The
        gradient that a low-rank update passes on runs only if it is of use nearer the input: the update pays for it.
        """
        if self.condition is None or self.runs_if is None:
            return self.needs
        conditional = (self.condition >= 0) & self.runs_if
        low_rank = np.array([is_low_rank(name) for name in self.tensors])[:, None]
        bounded: np.ndarray = self.needs & (~conditional | self.needs[:, self.condition] | low_rank)
        return bounded

    def _charged(self, needed: np.ndarray) -> np.ndarray:
        if self.condition is None:
            return needed
        charged: np.ndarray = needed & ((self.condition < 0) | (needed[..., self.condition] == self.runs_if))
        return charged

    def rows(self, tensors: Iterable[str]) -> list[int]:
        """The rows of `needs` that belong to these tensors."""
        tensors = list(tensors)
        unknown = [name for name in tensors if name not in self._row]
        if unknown:
            raise ValueError(
                f"Not candidates of this cost graph: {unknown[:3]}{' ...' if len(unknown) > 3 else ''}. "
                "Use names from `graph.tensors`; a tensor whose gradient the profiled step did not compute has no cost."
            )
        return [self._row[name] for name in tensors]

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.tensors)}
