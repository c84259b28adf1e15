"""The most importance that fits the budget.

    >>> graph = profile(model, batch)
    >>> selection = select(graph, importance, rho=0.5)       # importance: {tensor name: float}
    >>> selection.ratio                                      # never above rho
    0.4999
    >>> selection.tensors
    frozenset({'model.layers.29.mlp.down_proj.weight', ...})

The operations that a gradient needs are its own (its weight gradient) or shared (activation gradients, which tensors
nearer the loss need too). Sort the tensors by the cost of what they share: once the shared operations of the first j
are paid for, each of them costs only its own, which is a 0/1 knapsack, and one table over the sorted tensors holds the
answer for every j. The paper's dynamic program (section 3.3) is quadratic in depth, and not exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .cost import CostGraph


# Costs are rounded up to about this fraction of the budget, so what is chosen always fits.
RESOLUTION = 4000
# So many sets of shared operations around a local optimum get a knapsack of their own.
PROMISING = 32


@dataclass(frozen=True)
class Selection:
    """The tensors that are trained until the next selection.

    Attributes:
        tensors: their names.
        ratio: FLOPs of a training step with them over those of full fine-tuning; at most rho.
        importance: the sum of their importances.
    """

    tensors: frozenset[str]
    ratio: float
    importance: float


def select(graph: CostGraph, importance: Mapping[str, float], rho: float, always: Iterable[str] = ()) -> Selection:
    """Choose the set of tensors with the most importance whose training step costs at most `rho` of a full one.

        >>> select(graph, {"a.weight": 2.0, "b.weight": 1.0}, rho=0.7)
        Selection(tensors=frozenset({'a.weight'}), ratio=0.66, importance=2.0)

    Args:
        graph: see `profile`.
        importance: a finite, non-negative float per candidate; a candidate that is missing has none. Only proportions
            matter.
        rho: the budget, in (0, 1]. 1.0 selects every candidate, whatever its importance.
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

    fixed = np.zeros(len(graph.tensors), dtype=bool)
    fixed[graph.rows(always)] = True
    if rho == 1:
        chosen = np.ones_like(fixed)
    else:
        budget = math.floor(rho * graph.full_flops) - graph.forward_flops
        cheapest = _check_reachable(graph, rho, budget, fixed)
        if not (value > 0).any():
            raise ValueError(
                "Every importance is zero, so there is nothing to choose by: check that the loss has a gradient."
            )
        chosen = _choose(graph, value, budget, fixed)
        if not chosen.any():
            chosen[cheapest] = True

    tensors = frozenset(graph.tensors[i] for i in np.flatnonzero(chosen))
    selection = Selection(tensors, graph.ratio(tensors), float(value[chosen].sum()))
    assert selection.ratio <= rho
    return selection


def _check_reachable(graph: CostGraph, rho: float, budget: int, fixed: np.ndarray) -> int:
    """The row of the cheapest tensor, if the budget reaches the floor."""
    cheapest = int(np.argmin(graph.bounded_needs @ graph.costs))
    if fixed.any():
        floor = graph.ratio(graph.tensors[i] for i in np.flatnonzero(fixed))
        what = f"the tensors that are always trained ({graph.tensors[np.flatnonzero(fixed)[0]]}, ...) already reach"
    else:
        floor = graph.floor
        what = f"the cheapest tensor, {graph.tensors[cheapest]}, reaches"
    if round(floor * graph.full_flops) > budget + graph.forward_flops:
        raise ValueError(
            f"rho={rho} is under the floor of {floor:.4f} on this model and batch, which {what}: the forward pass alone "
            f"costs {graph.forward_flops / graph.full_flops:.4f} of a full fine-tuning step. Choose rho >= {floor:.4f}."
        )
    return cheapest


def _choose(graph: CostGraph, value: np.ndarray, budget: int, fixed: np.ndarray) -> np.ndarray:
    """The tensors to train, `fixed` among them, as a (N,) bool array."""
    paid = graph.bounded_needs[fixed].any(axis=0)
    budget -= int(graph.costs @ paid)
    items = np.flatnonzero((value > 0) & ~fixed)
    if not len(items):
        return fixed
    needs, value = graph.bounded_needs[items][:, ~paid], value[items]
    costs = graph.costs[~paid]
    users = needs.sum(axis=0)
    shared = needs & (users > 1)
    own_cost = _sum_by(needs.argmax(axis=0)[users == 1], costs[users == 1], len(items))
    problem = _Closures(needs, shared, costs, own_cost, value, budget)

    order = np.argsort(shared @ costs, kind="stable")
    first_user = shared[order].argmax(axis=0)[users > 1]
    prefix_cost = np.cumsum(_sum_by(first_user, costs[users > 1], len(items)))
    best = problem.knapsack(order, budget - prefix_cost)
    if (shared[order][:-1] & ~shared[order][1:]).any():
        for start in (shared[best].any(axis=0), np.zeros(len(costs), dtype=bool)):
            for paid, bound in problem.climb(start):
                if bound <= value[best].sum():
                    break
                best = max(best, problem.within(paid), key=lambda found: value[found].sum())

    chosen = fixed.copy()
    chosen[items[best]] = True
    return chosen


def _sum_by(index: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Integers summed by index, exactly."""
    total = np.zeros(length, dtype=np.int64)
    np.add.at(total, index, values)
    return total


@dataclass(frozen=True)
class _Closures:
    """A knapsack in which items also need shared operations, that are paid for once.

    Attributes (N items, C operations):
        needs: (N, C) bool; shared: (N, C) bool, those that more than one item needs.
        costs: (C,) of the operations; own_cost: (N,) of what only this item needs; value: (N,); budget: int.
    """

    needs: np.ndarray
    shared: np.ndarray
    costs: np.ndarray
    own_cost: np.ndarray
    value: np.ndarray
    budget: int

    def within(self, paid: np.ndarray) -> np.ndarray:
        """The best items once the shared operations `paid` (C,) are bought, and whatever else fits then."""
        items = np.flatnonzero(~(self.shared & ~paid).any(axis=1))
        return self.knapsack(items, np.full(len(items), self.budget - int(self.costs @ paid)))

    def knapsack(self, items: np.ndarray, capacity: np.ndarray) -> np.ndarray:
        picked = items[_knapsack(self.value[items], self.own_cost[items], capacity, self.budget)]
        return self.fill(picked)

    def climb(self, paid: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
        """Local search over sets of shared operations: add what one item needs, drop one operation, or swap.

        Gives the most promising sets around the local optimum with their bounds, the best first.
        """
        patterns = np.unique(self.shared, axis=0)
        reached = self.bound(paid[None])[0]
        while True:
            dropped = np.stack([paid] + [self._without(paid, operation) for operation in np.flatnonzero(paid)])
            swapped = (np.unique(dropped, axis=0)[:, None] | patterns).reshape(-1, len(paid))
            for neighbours in (np.concatenate([paid | patterns, dropped]), swapped):
                bounds = self.bound(neighbours)
                if bounds.max() > reached * (1 + 1e-9):
                    reached, paid = bounds.max(), neighbours[bounds.argmax()]
                    break
            else:
                break
        neighbours, first = np.unique(swapped, axis=0, return_index=True)
        promising = np.argsort(-bounds[first], kind="stable")[:PROMISING]
        yield from ((neighbours[i], bounds[first][i]) for i in promising)

    def _without(self, paid: np.ndarray, operation: int) -> np.ndarray:
        usable = ~(self.shared & ~paid).any(axis=1) & ~self.shared[:, operation]
        return self.shared[usable].any(axis=0)

    def bound(self, paid: np.ndarray) -> np.ndarray:
        """For each of (K, C) sets of paid operations, the importance in reach if items could be cut: (K,)."""
        density = np.argsort(-self.value / np.maximum(self.own_cost, 1), kind="stable")
        shared = self.shared[density].astype(np.float32)
        within = (shared @ ~paid.T) == 0  # (N, K)
        cost = np.where(within, self.own_cost[density, None], 0)
        left = self.budget - paid @ self.costs  # (K,)
        spent_before = np.cumsum(cost, axis=0) - cost
        share = np.clip((left - spent_before) / np.maximum(cost, 1), 0, 1)
        gain = (within * share * self.value[density, None]).sum(axis=0)
        return np.where(left >= 0, gain, -1.0)

    def fill(self, picked: np.ndarray) -> np.ndarray:
        """Add whatever still fits at its exact cost, the most important first."""
        chosen = np.zeros(len(self.value), dtype=bool)
        chosen[picked] = True
        paid = self.needs[chosen].any(axis=0)
        left = self.budget - int(self.costs @ paid)
        for i in np.argsort(-self.value, kind="stable"):
            if not chosen[i] and self.own_cost[i] <= left:
                extra = int(self.costs @ (self.needs[i] & ~paid))
                if extra <= left:
                    chosen[i] = True
                    paid |= self.needs[i]
                    left -= extra
        return np.flatnonzero(chosen)


def _knapsack(value: np.ndarray, cost: np.ndarray, capacity: np.ndarray, budget: int) -> np.ndarray:
    """Indices of the best subset that, for some j, lies in the first j items and costs at most `capacity[j - 1]`.

    One 0/1 knapsack, read off after every item at that item's capacity: O(items * RESOLUTION).
    """
    # Layers of one shape have costs with a large common divisor: then nothing is rounded.
    common = int(np.gcd.reduce(cost[cost > 0], initial=0)) or 1
    unit = common * max(1, budget // (common * RESOLUTION))
    weight = -(-cost // unit)
    limit = capacity // unit
    best = np.zeros(budget // unit + 1)
    takes = np.zeros((len(value), len(best)), dtype=bool)
    reached, last = 0.0, -1
    for j, (v, w) in enumerate(zip(value, weight)):
        if w < len(best):
            taken = best[: len(best) - w] + v
            take = taken > best[w:]
            takes[j, w:] = take
            best[w:] = np.where(take, taken, best[w:])
        if limit[j] >= 0 and best[limit[j]] > reached:
            reached, last = best[limit[j]], j

    picked = []
    room = limit[last] if last >= 0 else 0
    for j in range(last, -1, -1):
        if takes[j, room]:
            picked.append(j)
            room -= weight[j]
    return np.array(picked[::-1], dtype=int)
