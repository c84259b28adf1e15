"""A knapsack whose items share costs: each item needs operations, and an operation is paid for once.

    >>> needs = np.array([[1, 1, 0], [1, 0, 1]], dtype=bool)       # both items need operation 0
    >>> most_valuable(needs, costs=np.array([5, 2, 3]), value=np.array([1.0, 2.0]), budget=9)
    array([1])

What only one item needs is its own cost. The other operations form a partial order: `a` comes before `b` if every item
that needs `b` needs `a`. Orders of real models are put together from two patterns, over and over: *series* (layer upon
layer: who reaches the deeper has paid for all of the upper) and *parallel* (attention beside the feed-forward, experts,
two towers). Along such an order one table over the budget is enough, as in the 0/1 knapsack: what the upper part has
reached is what the deeper part starts from. Where an order is neither, one operation is tried both ways.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


# The budget is cut into about so many units. Costs are rounded to them, and what seems to cost a little more than the
# budget may fit: the tables go on for some more units, and what they hold is checked at its exact cost.
RESOLUTION = 4000
SLACK = 40
# So often an operation of an order that is neither series nor parallel is tried both ways.
PIVOTS = 6


def most_valuable(
    needs: np.ndarray, costs: np.ndarray, value: np.ndarray, budget: int, one_of: np.ndarray | None = None
) -> np.ndarray:
    """The rows of the items that are worth most within the budget.

    Args:
        needs: (N, C) bool, which operations each item needs.
        costs: (C,) int64. What a set of items costs is the cost of the union of its operations.
        value: (N,) float, positive.
        budget: int, not negative.
        one_of: (N,) int, at most one is taken of the items with the same number; None: any of them may be.

    Returns:
        (K,) int, never over the budget; optimal but for the rounding of costs where the order is series-parallel.
    """
    one_of = np.arange(len(value)) if one_of is None else np.unique(one_of, return_inverse=True)[1]
    problem = _Problem.of(needs, costs, value, budget, one_of)
    room = round(budget / problem.unit) + SLACK
    table = problem.optional(np.arange(len(problem.users)), _Table(np.zeros(room + 1), 0, None))
    while True:
        chosen = np.zeros(len(value), dtype=bool)
        chosen[list(_trace(table, room))] = True
        over = int(costs @ needs[chosen].any(axis=0)) - budget
        if over <= 0:
            return np.flatnonzero(_filled(chosen, needs, costs, value, -over, one_of))
        room -= max(1, int(over / problem.unit / 2))


class _Table(NamedTuple):
    """The most value for every number of units, once `spent` was paid; and how it came about, to trace it back."""

    best: np.ndarray
    spent: int
    history: tuple[Any, ...] | None


@dataclass(frozen=True)
class _Problem:
    """Nodes of the order: (M,) sets of operations that the same items need, or that one item needs.

    Attributes:
        users: (M, N) bool, the items that need a node. `a` is before `b` if `users[a]` is a superset of `users[b]`.
        cost: (M,) of the node itself.
        items: for each node the items whose last need it is, those of which one is taken at most together.
        own_cost, value: (N,) of the items.
        unit: the cost that is one unit of the tables.
    """

    users: np.ndarray
    cost: list[int]
    items: list[list[list[int]]]
    own_cost: np.ndarray
    value: np.ndarray
    budget: int
    unit: int

    @classmethod
    def of(cls, needs: np.ndarray, costs: np.ndarray, value: np.ndarray, budget: int, one_of: np.ndarray) -> _Problem:
        count = needs.sum(axis=0)
        own_cost = np.zeros(len(needs), dtype=np.int64)
        np.add.at(own_cost, needs.argmax(axis=0)[count == 1], costs[count == 1])

        # Forms of one tensor need the same shared operations; where recomputation makes them differ, both pay for all.
        by_kind = np.argsort(one_of, kind="stable")
        starts = np.searchsorted(one_of[by_kind], np.arange(one_of.max() + 1))
        shared = np.logical_or.reduceat(needs[by_kind][:, count > 1], starts)
        operations, operation_of = _unique_rows(shared[one_of].T)
        patterns, pattern_of = _unique_rows(operations.T)
        users, node_of = _unique_rows(np.concatenate([operations, _users_of(patterns, operations)]))
        cost = np.zeros(len(users), dtype=np.int64)
        np.add.at(cost, node_of[operation_of], costs[count > 1])
        last = node_of[len(operations) + pattern_of]
        by_node = np.argsort(last, kind="stable")
        ends = np.cumsum(np.bincount(last, minlength=len(users)))
        items = [_together(by_node[start:end], one_of) for start, end in zip([0, *ends], ends)]
        # Layers of one shape have costs with a large common divisor: then little or nothing is rounded.
        common = int(np.gcd.reduce(costs)) or 1
        unit = common * max(1, round(budget / common / RESOLUTION))
        return cls(users, cost.tolist(), items, own_cost, value, budget, unit)

    def optional(self, nodes: np.ndarray, table: _Table, pivots: int = PIVOTS) -> _Table:
        """What can be reached by paying for any of these nodes, in an order that their needs allow."""
        reached = table
        for block in _series(self.users[nodes]):
            block = nodes[block]
            if table.spent > self.budget:
                break
            if len(block) > 1:
                reached = self._better(reached, self._branching(block, table, pivots))
            table = self.paid(block, table)
            if len(block) == 1:
                reached = self._better(reached, table)
        return reached

    def paid(self, nodes: np.ndarray, table: _Table) -> _Table:
        """What can be reached once all these nodes are paid for, and any of their items taken."""
        best, spent, history = table
        best = best.copy()
        for node in nodes:
            spent += self.cost[node]
            for alternatives in self.items[node]:
                without, before = best, history
                best = best.copy() if len(alternatives) > 1 else best
                for item in alternatives:
                    units = round(self.own_cost[item] / self.unit)
                    if units < len(best):
                        taken = without[: len(best) - units] + self.value[item]
                        better = taken > best[units:]
                        np.copyto(best[units:], taken, where=better)
                        history = (history, item, units, better, before)
        return _Table(best, spent, history)

    def _branching(self, nodes: np.ndarray, table: _Table, pivots: int) -> _Table:
        before = _supersets(self.users[nodes])
        parts = _components(before | before.T)
        if len(parts) > 1:
            for part in parts:
                table = self.optional(nodes[part], table, pivots)
            return table
        if not pivots:  # any one order of them is allowed, if not the best
            reached = table
            for node in nodes:
                table = self.paid(node[None], table)
                reached = self._better(reached, table)
            return reached
        pivot = np.argmax((before.sum(axis=0) + 1) * (before.sum(axis=1) + 1))
        with_pivot, without = before[:, pivot].copy(), ~before[pivot]
        with_pivot[pivot], without[pivot] = True, False
        paid = self.paid(nodes[with_pivot], table)
        return self._better(
            self.optional(nodes[without], table, pivots - 1), self.optional(nodes[~with_pivot], paid, pivots - 1)
        )

    def _better(self, table: _Table, other: _Table) -> _Table:
        """The better of two for every number of units left by the first, which has spent less."""
        units = round((other.spent - table.spent) / self.unit)
        if units >= len(table.best):
            return table
        found = other.best[: len(table.best) - units]
        better = found > table.best[units:]
        best = table.best.copy()
        np.copyto(best[units:], found, where=better)
        return _Table(best, table.spent, (table.history, None, units, better, other.history))


def _trace(table: _Table, room: int) -> Iterator[int]:
    history = table.history
    while history is not None:
        otherwise, item, units, better, taken_from = history
        if room < units or not better[room - units]:
            history = otherwise
        else:
            if item is not None:
                yield item
            history = taken_from
            room -= units


def _filled(
    chosen: np.ndarray, needs: np.ndarray, costs: np.ndarray, value: np.ndarray, left: int, one_of: np.ndarray
) -> np.ndarray:
    """Add whatever still fits at its exact cost, the most valuable first."""
    paid = needs[chosen].any(axis=0)
    taken = set(one_of[chosen])
    for i in np.argsort(-value, kind="stable"):
        if one_of[i] not in taken:
            extra = int(costs @ (needs[i] & ~paid))
            if extra <= left:
                chosen[i] = True
                taken.add(one_of[i])
                paid |= needs[i]
                left -= extra
    return chosen


def _together(items: np.ndarray, one_of: np.ndarray) -> list[list[int]]:
    """The items, those of which one is taken at most together.

    >>> _together(np.array([4, 7, 9]), one_of=np.array([0, 0, 0, 0, 1, 0, 0, 2, 0, 1]))
    [[4, 9], [7]]
    """
    together = defaultdict(list)
    for item in items:
        together[one_of[item]].append(item)
    return list(together.values())


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a bool array, and for each row its index among them."""
    packed = np.packbits(rows, axis=1)
    _, first, index = np.unique([row.tobytes() for row in packed], return_index=True, return_inverse=True)
    return rows[first], index.reshape(-1)


def _users_of(patterns: np.ndarray, operations: np.ndarray) -> np.ndarray:
    """(P, N) bool: the items that need all operations of a pattern. Patterns are (P, O), operations (O, N)."""
    users = np.ones((len(patterns), operations.shape[1]), dtype=bool)
    left = np.ones(len(patterns), dtype=bool)
    # Who needs an operation of a block needs all of the blocks before, so that the deepest block tells.
    for block in reversed(_series(operations)):
        wanted = patterns[:, block]
        for pattern in np.flatnonzero(left & wanted.any(axis=1)):
            users[pattern] = operations[block[wanted[pattern]]].all(axis=0)
            left[pattern] = False
    return users


def _series(users: np.ndarray) -> list[np.ndarray]:
    """Cut the rows of a (M, N) array into blocks, each contained in every row of the blocks before it."""
    order = np.argsort(-users.sum(axis=1), kind="stable")
    packed = np.packbits(users[order], axis=1)
    in_all_before = np.bitwise_and.accumulate(packed)
    in_any_after = np.bitwise_or.accumulate(packed[::-1])[::-1]
    cuts = np.flatnonzero(~(in_any_after[1:] & ~in_all_before[:-1]).any(axis=1)) + 1
    return [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)])]


def _supersets(rows: np.ndarray) -> np.ndarray:
    """(M, M) bool: whether row a contains row b, for distinct rows."""
    common = rows.astype(np.float32) @ rows.T.astype(np.float32)
    contains: np.ndarray = common == rows.sum(axis=1)
    np.fill_diagonal(contains, False)
    return contains


def _components(adjacent: np.ndarray) -> list[np.ndarray]:
    """The connected components of a graph, as arrays of its nodes."""
    unseen = np.ones(len(adjacent), dtype=bool)
    found = []
    while unseen.any():
        component = np.zeros(len(adjacent), dtype=bool)
        frontier = component.copy()
        frontier[unseen.argmax()] = True
        while frontier.any():
            component |= frontier
            frontier = adjacent[frontier].any(axis=0) & ~component
        unseen &= ~component
        found.append(np.flatnonzero(component))
    return found
