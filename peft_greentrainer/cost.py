"""What does training a set of tensors cost? Exact FLOPs of a training step, or measured seconds, for any architecture.

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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .forms import is_low_rank, low_rank_form, tensor_of
from .low_rank_cost import LowRank
from .passes import loss_of, record
from .recorder import CostRecorder, bits_of
from .seconds import timed
from .trainable import can_be_trained


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
        return self.forward_cost + int(self._charged(self.needs[self.rows(tensors)].any(axis=0)) @ self.costs)

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
        if self.condition is None:
            return self.needs
        conditional = (self.condition >= 0) & self.runs_if
        low_rank = np.array([is_low_rank(name) for name in self.tensors])[:, None]
        return self.needs & (~conditional | self.needs[:, self.condition] | low_rank)

    def _charged(self, needed: np.ndarray) -> np.ndarray:
        if self.condition is None:
            return needed
        return needed & ((self.condition < 0) | (needed[..., self.condition] == self.runs_if))

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

    @classmethod
    def of(cls, recorder: CostRecorder, candidates: Iterable[str]) -> CostGraph:
        """The cost graph of what was recorded, with those candidates that got a gradient.

        Raises `ValueError` where none of them did.
        """
        candidates = set(candidates)
        names = list(reversed(recorder.needed_by))  # gradients arrive in the reverse of execution order
        if not candidates.intersection(names):
            raise ValueError("The loss reaches no candidate tensor: check that it depends on the model's parameters.")
        n_operations = len(recorder.costs)
        width = (n_operations + 7) // 8
        bits = [
            np.frombuffer((recorder.needed_by[name] | recorder.forced).to_bytes(width, "little"), dtype=np.uint8)
            for name in names
        ]
        needs = np.unpackbits(np.stack(bits), axis=1, count=n_operations, bitorder="little").astype(bool)

        # Operations that the same tensors need under the same condition are one class, added ones apart.
        _, same_needs = np.unique(np.packbits(needs, axis=0), axis=1, return_inverse=True)
        condition, runs_if = np.full(n_operations, -1), np.ones(n_operations, dtype=bool)
        for operation, (on, wanted) in recorder.conditions.items():
            condition[operation], runs_if[operation] = same_needs.reshape(-1)[on], wanted
        added = np.zeros(n_operations, dtype=bool)
        added[list(bits_of(recorder.added))] = True
        kinds, first, class_of = np.unique(
            np.stack([same_needs.reshape(-1), condition, runs_if, added]),
            axis=1,
            return_index=True,
            return_inverse=True,
        )
        costs = np.zeros(len(first), dtype=np.int64)
        np.add.at(costs, class_of.reshape(-1), np.array(recorder.costs, dtype=np.int64))
        graph = cls(
            tensors=tuple(names),
            forward_cost=recorder.forward_cost - recorder.added_forward_cost,
            full_cost=0,
            costs=np.where(added[first], 0, costs),
            needs=needs[:, first],
            unit=recorder.unit,
            forced_cost=sum(recorder.costs[operation] for operation in bits_of(recorder.forced)),
            condition=np.where(kinds[1] < 0, -1, np.searchsorted(kinds[0], kinds[1])) if recorder.conditions else None,
            runs_if=runs_if[first] if recorder.conditions else None,
        )
        full_cost = graph.cost(name for name in names if not is_low_rank(name))
        if not recorder.forms.provisional:
            graph = replace(graph, forward_cost=recorder.forward_cost, costs=costs)
        rows = [i for i, name in enumerate(names) if name in candidates]
        return replace(graph, tensors=tuple(names[i] for i in rows), needs=graph.needs[rows], full_cost=full_cost)

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.tensors)}


def profile(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple | Tensor,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    candidates: Iterable[str] | None = None,
    low_rank: int = 0,
    unit: Literal["flops", "seconds"] = "flops",
    optimizer: torch.optim.Optimizer | None = None,
) -> CostGraph:
    """Record one forward and backward pass of `model` on `batch` and return its cost graph.

        >>> graph = profile(model, {"input_ids": ids, "labels": ids})        # ids: (batch, tokens)
        >>> graph = profile(net, images, loss_fn=lambda output, batch: F.cross_entropy(output, labels))

    Args:
        model: any module. On the `meta` device nothing is computed. It is left as it was: parameters, gradients,
            `requires_grad`, buffers and the random state.
        batch: keyword arguments of the model as a mapping, positional ones as a tuple, or a single tensor.
        loss_fn: `loss_fn(output, batch)` gives the scalar loss, where the model's output has no `.loss`.
        candidates: names of parameters that may be selected; default: every floating-point parameter. The others
            still count in the cost of full fine-tuning.
        low_rank: offer every weight of an `nn.Linear` as a low-rank update of this rank too, as the candidate
            `low_rank_form(name)`; 0: whole tensors only. Not in seconds.
        unit: "flops", or "seconds" to time every operation, in a few passes; see `peft_greentrainer.seconds`.
        optimizer: for seconds, the optimizer whose pass over each trained tensor is added; default: `torch.optim.AdamW`.

    Raises:
        ValueError: if the batch gives no loss, or seconds are asked for on the `meta` device or of low-rank forms.
    """
    parameters = {name: p for name, p in model.named_parameters() if can_be_trained(p)}
    linear = {
        low_rank_form(f"{key}.weight"): module
        for key, module in model.named_modules()
        if type(module).forward is nn.Linear.forward and f"{key}.weight" in parameters
    }

    def loss() -> Tensor:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple) else model(batch)
        return loss_fn(output, batch) if loss_fn is not None else loss_of(output)

    if unit == "seconds":
        if low_rank:
            raise ValueError("What a low-rank form would take is known in FLOPs only: use unit='flops'.")
        recorder = timed(model, loss, parameters, optimizer)
    elif unit == "flops":
        recorder = CostRecorder(LowRank(low_rank, linear if low_rank else {}))
        record(recorder, model, loss, parameters, recorder.mark)
    else:
        raise ValueError(f"unit must be 'flops' or 'seconds'; got {unit!r}.")
    return CostGraph.of(recorder, [*parameters, *linear] if candidates is None else candidates)
