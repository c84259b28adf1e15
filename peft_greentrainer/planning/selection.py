"""The most importance that fits the budget.

    >>> graph = profile(model, batch)
    >>> selection = select(graph, importance, rho=0.5)       # importance: {tensor name: float}
    >>> selection.ratio                                      # never above rho
    0.4999
    >>> selection.tensors
    frozenset({'model.layers.29.mlp.down_proj.weight', ...})

The operations that a gradient needs are its own (its weight gradient) or shared (activation gradients, which tensors
nearer the loss need too): a knapsack whose items share costs, see `closures`. The paper's dynamic program (section 3.3)
takes every model for a chain, is quadratic in its depth, and not exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..tensors.names import is_low_rank, low_rank_form, tensor_of
from .closures import most_valuable
from .graph import CostGraph


FORCED = (
    " Of that, {:.4f} is spent because an activation is made to require grad, as gradient checkpointing does to the output "
    "of the embedding: train without it, or with gradient_checkpointing_kwargs={{'use_reentrant': False}} and after "
    "model.disable_input_require_grads()."
)


@dataclass(frozen=True)
class Selection:
    """The tensors that are trained until the next selection.

    Attributes:
        tensors: their names.
        ratio: cost of a training step with them over that of full fine-tuning, in the unit of the graph; at most rho.
        importance: the sum of their importances.
        low_rank: those of the tensors that are trained as a low-rank update; the others are trained whole.
    """

    tensors: frozenset[str]
    ratio: float
    importance: float
    low_rank: frozenset[str] = frozenset()

    @property
    def candidates(self) -> frozenset[str]:
        """What the cost graph calls them: `graph.ratio(selection.candidates) == selection.ratio`."""
        return (self.tensors - self.low_rank) | {low_rank_form(tensor) for tensor in self.low_rank}


def select(graph: CostGraph, importance: Mapping[str, float], rho: float, always: Iterable[str] = ()) -> Selection:
    """Choose the set of tensors with the most importance whose training step costs at most `rho` of a full one.

        >>> select(graph, {"a.weight": 2.0, "b.weight": 1.0}, rho=0.7)
        Selection(tensors=frozenset({'a.weight'}), ratio=0.66, importance=2.0)

    Args:
        graph: see `profile`.
        importance: a finite, non-negative float per candidate; a candidate that is missing has none. Only proportions
            matter. Of the forms of a tensor (`profile(..., r=8)`) at most one is taken.
        rho: the budget, in (0, 1]. Where it pays for every tensor, whole where that is offered, all of them are selected,
            whatever their importance.
        always: candidates that are trained in any case (task heads). They count in the budget.

    Raises:
        ValueError: rho outside (0, 1] or under the floor; an importance that is not finite, negative, of an unknown
            tensor, or zero for all.
    """
    if not 0 < rho <= 1:
        raise ValueError(
            f"rho must be in (0, 1], the share of a full fine-tuning step that a step may cost; got {rho}."
        )
    value = np.zeros(len(graph.tensors))
    value[graph.rows(importance)] = list(importance.values())
    if not np.isfinite(value).all() or (value < 0).any():
        bad = [graph.tensors[i] for i in np.flatnonzero(~np.isfinite(value) | (value < 0))]
        raise ValueError(f"Importance must be finite and not negative; it is not for {bad[:3]}. Measure it again.")

    fixed, chosen = np.zeros((2, len(graph.tensors)), dtype=bool)
    fixed[graph.rows(always)] = True
    if everything_fits(graph, rho):
        chosen[graph.rows(graph.dearest_forms)] = True
    else:
        budget = math.floor(rho * graph.full_cost) - graph.forward_cost
        _check_reachable(graph, rho, fixed)
        if not (value > 0).any():
            raise ValueError(
                "Every importance is zero, so there is nothing to choose by: check that the loss has a gradient."
            )
        chosen = _choose(graph, value, budget, fixed)
        if not chosen.any():
            chosen[graph.cheapest] = True

    candidates = {graph.tensors[i] for i in np.flatnonzero(chosen)}
    tensors = frozenset(map(tensor_of, candidates))
    low_rank = frozenset(map(tensor_of, filter(is_low_rank, candidates)))
    selection = Selection(tensors, graph.ratio(candidates), float(value[chosen].sum()), low_rank)
    assert selection.ratio <= rho and len(tensors) == len(candidates)
    return selection


def everything_fits(graph: CostGraph, rho: float) -> bool:
    """Whether there is nothing to choose: the budget pays for every tensor, whole where that is offered."""
    return graph.ratio(graph.dearest_forms) <= rho


def _check_reachable(graph: CostGraph, rho: float, fixed: np.ndarray) -> None:
    if fixed.any():
        floor = graph.ratio(graph.tensors[i] for i in np.flatnonzero(fixed))
        what = f"the tensors that are always trained ({graph.tensors[np.flatnonzero(fixed)[0]]}, ...) already reach"
    else:
        floor = graph.floor
        what = f"the cheapest tensor, {graph.tensors[graph.cheapest]}, reaches"
    if floor > rho:
        raise ValueError(
            f"rho={rho} is under the floor of {floor:.4f} on this model and batch, which {what}: the forward pass alone "
            f"costs {graph.forward_cost / graph.full_cost:.4f} of a full fine-tuning step. Choose rho >= {floor:.4f}."
            + (FORCED.format(graph.forced_cost / graph.full_cost) if graph.forced_cost else "")
        )


def _choose(graph: CostGraph, value: np.ndarray, budget: int, fixed: np.ndarray) -> np.ndarray:
    """The tensors to train, `fixed` among them, as a (N,) bool array."""
    paid = graph.bounded_needs[fixed].any(axis=0)
    taken = {tensor_of(graph.tensors[i]) for i in np.flatnonzero(fixed)}
    items = np.array([i for i in np.flatnonzero(value > 0) if tensor_of(graph.tensors[i]) not in taken], dtype=int)
    needs, costs = graph.bounded_needs[items][:, ~paid], graph.costs[~paid]
    budget -= int(graph.costs @ paid)
    chosen = fixed.copy()
    if len(items) and budget >= 0:
        _, of_tensor = np.unique([tensor_of(graph.tensors[i]) for i in items], return_inverse=True)
        chosen[items[most_valuable(needs, costs, value[items], budget, of_tensor)]] = True
    return chosen
