"""The operations of a pass: what each costs, and which of them each gradient needs.

    >>> operations = Operations()
    >>> product = operations.new_operation(cost=6000)
    >>> operations.inherit(grad, product)             # grad, a tensor of the backward pass, comes from that product ...
    >>> operations.mark("a.weight", grad)             # ... and is the gradient of this parameter
    >>> operations.graph(["a.weight"]).cost(["a.weight"])
    6000

A set of operations is an int, bit by bit. Every tensor made in the backward pass carries the set that it comes from as an
attribute, whose name is of these `Operations` alone; so no tensor is kept alive.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..planning.graph import CostGraph
from ..tensors.names import is_low_rank


_numbers = itertools.count()


class Operations:
    """What was recorded of one or more passes.

    Attributes:
        unit: of all costs here: "flops", or "seconds", which are kept as whole nanoseconds.
        forward_cost: of the forward passes, and of all else that every step runs.
        added_forward_cost: what of that the updates of low-rank forms cost: full fine-tuning has none.
        costs: of each operation of the backward passes, by its number. Number 0 is no operation.
        added: the set of operations that the updates of low-rank forms add.
        needed_by: by name of a tensor, the set of operations that its gradient comes from; the last to arrive is the last.
        forced: the set of operations that every step runs, whatever is trained.
        conditions: by the number of an operation that some steps run only, the number of the operation that this depends
            on, and whether it runs if a trained tensor needs that one (True) or if none does (False).
        recomputed: the set of operations by which gradient checkpointing runs segments of the forward pass again.
        recomputed_so_far: those of the segment that it runs now.
    """

    unit: Literal["flops", "seconds"] = "flops"

    def __init__(self) -> None:
        self.forward_cost = 0
        self.added_forward_cost = 0
        self.costs = [0]
        self.added = 0
        self.needed_by: dict[str, int] = {}
        self.forced = 0
        self.conditions: dict[int, tuple[int, bool]] = {}
        self.recomputed = 0
        self.recomputed_so_far = 0
        self._attribute = f"_costed_ancestors_{next(_numbers)}"

    def new_operation(self, cost: int) -> int:
        """The set of one more operation."""
        self.costs.append(cost)
        return 1 << (len(self.costs) - 1)

    # Sets of operations, on tensors

    def ancestors(self, tensor: Tensor) -> int:
        """The operations that this tensor comes from."""
        ancestors: int = getattr(tensor, self._attribute, 0)
        base = tensor._base
        return ancestors if base is None else ancestors | getattr(base, self._attribute, 0)

    def inherit(self, tensor: Tensor, ancestors: int) -> None:
        """Add operations to those that this tensor, and the one that it is a view of, come from."""
        setattr(tensor, self._attribute, self.ancestors(tensor) | ancestors)
        if tensor._base is not None:
            setattr(tensor._base, self._attribute, self.ancestors(tensor._base) | ancestors)

    def mark(self, name: str, grad: Tensor) -> None:
        """Note that `grad` is the gradient of the tensor `name`. Call it as gradients arrive."""
        self.need(name, self.ancestors(grad))

    def need(self, name: str, operations: int) -> None:
        """Note that the gradient of the tensor `name`, which arrives now, comes from these."""
        self.needed_by[name] = self.needed_by.pop(name, 0) | operations

    # Whether a step runs them

    def force(self, grad: Tensor) -> None:
        """Note that every step computes `grad`, whatever is trained."""
        self.forced |= self.ancestors(grad)

    def charge_always(self, grad: Tensor) -> None:
        """Note that every step computes `grad`, whatever is trained, since it is that of something else that is trained."""
        for operation in bits_of(self.ancestors(grad)):
            if operation in self.conditions or self.forced >> operation & 1:
                self.forced |= 1 << operation
                continue
            self.forward_cost += self.costs[operation]
            if self.added >> operation & 1:
                self.added_forward_cost += self.costs[operation]
            self.costs[operation] = 0

    def run_only_if(self, operations: int, condition: int) -> None:
        """These operations run only in steps in which some trained tensor needs the operation `condition`."""
        assert condition
        for operation in bits_of(operations & ~condition):
            self.conditions[operation] = (condition.bit_length() - 1, True)

    def run_only_unless(self, operations: int, condition: int) -> None:
        """These operations run only in steps in which no trained tensor needs the operation `condition`."""
        assert condition
        for operation in bits_of(operations):
            self.conditions[operation] = (condition.bit_length() - 1, False)

    def run_as_one(self, operations: int) -> None:
        """Whoever needs the first of these operations needs all of them."""
        first, *others = bits_of(operations)
        for operation in others:
            self.costs[first] += self.costs[operation]
            self.costs[operation] = 0

    # Forward passes, which may turn out not to count

    @property
    def forward(self) -> ForwardCost:
        return ForwardCost(self.forward_cost, self.added_forward_cost)

    def take_back(self, cost: ForwardCost) -> None:
        """Forget a forward pass that no backward pass came from."""
        self.forward_cost -= cost.whole
        self.added_forward_cost -= cost.added

    # What was recorded, as a whole

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, as JSON: sets of operations in hexadecimal."""
        return {
            "forward_cost": self.forward_cost,
            "added_forward_cost": self.added_forward_cost,
            "added": hex(self.added),
            "costs": self.costs,
            "needed_by": {name: hex(bits) for name, bits in self.needed_by.items()},
            "forced": hex(self.forced),
            "conditions": [[operation, *condition] for operation, condition in self.conditions.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was recorded."""
        self.forward_cost = state["forward_cost"]
        self.added_forward_cost = state["added_forward_cost"]
        self.added = int(state["added"], 16)
        self.costs = list(state["costs"])
        self.needed_by = {name: int(bits, 16) for name, bits in state["needed_by"].items()}
        self.forced = int(state["forced"], 16)
        self.conditions = {operation: (on, wanted) for operation, on, wanted in state["conditions"]}

    def graph(self, candidates: Iterable[str], *, steps: int = 1, has_updates: bool = True) -> CostGraph:
        """The cost graph of these operations, with those candidates that got a gradient.

        Args:
            candidates: names of tensors that may be trained.
            steps: by how many steps these operations were run: costs are the mean over them.
            has_updates: whether the steps that the graph is about run the updates of low-rank forms that were recorded.

        Raises:
            ValueError: if no candidate got a gradient.
        """
        candidates = set(candidates)
        names = list(reversed(self.needed_by))  # gradients arrive in the reverse of execution order
        if not candidates.intersection(names):
            raise ValueError("The loss reaches no candidate tensor: check that it depends on the model's parameters.")
        needs = self._needs(names)
        added = self._flags(self.added)
        # Operations that the same tensors need under the same condition are one class, added ones apart.
        _, same_needs = np.unique(np.packbits(needs, axis=0), axis=1, return_inverse=True)
        same_needs = same_needs.reshape(-1)
        condition, runs_if = self._conditions(same_needs)
        kinds, first, class_of = np.unique(
            np.stack([same_needs, condition, runs_if, added]), axis=1, return_index=True, return_inverse=True
        )
        costs = np.zeros(len(first), dtype=np.int64)
        np.add.at(costs, class_of.reshape(-1), np.array(self.costs, dtype=np.int64))
        graph = CostGraph(
            tensors=tuple(names),
            forward_cost=self.forward_cost - self.added_forward_cost,
            full_cost=0,
            costs=np.where(added[first], 0, costs),
            needs=needs[:, first],
            unit=self.unit,
            forced_cost=sum(self.costs[operation] for operation in bits_of(self.forced)) // steps,
            condition=np.where(kinds[1] < 0, -1, np.searchsorted(kinds[0], kinds[1])) if self.conditions else None,
            runs_if=runs_if[first] if self.conditions else None,
        )
        full_cost = graph.cost(name for name in names if not is_low_rank(name))
        if has_updates:
            graph = replace(graph, forward_cost=self.forward_cost, costs=costs)
        rows = [i for i, name in enumerate(names) if name in candidates]
        return replace(
            graph,
            tensors=tuple(names[i] for i in rows),
            needs=graph.needs[rows],
            forward_cost=graph.forward_cost // steps,
            full_cost=full_cost // steps,
            costs=graph.costs // steps,
        )

    def _needs(self, names: list[str]) -> np.ndarray:
        """(tensors, operations) bool: which operations the gradient of each tensor needs."""
        return np.stack([self._flags(self.needed_by[name] | self.forced) for name in names])

    def _flags(self, operations: int) -> np.ndarray:
        """(operations,) bool: which of them are in a set."""
        size = len(self.costs)
        raw = np.frombuffer(operations.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
        return np.unpackbits(raw, count=size, bitorder="little").astype(bool)

    def _conditions(self, same_needs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each operation, the class of the one that it depends on, else -1; and whether it runs if that one is needed."""
        condition, runs_if = np.full(len(self.costs), -1), np.ones(len(self.costs), dtype=bool)
        for operation, (on, wanted) in self.conditions.items():
            condition[operation], runs_if[operation] = same_needs[on], wanted
        return condition, runs_if


@dataclass(frozen=True)
class ForwardCost:
    """The cost of forward passes, and what of it the updates of low-rank forms add."""

    whole: int
    added: int

    def __sub__(self, other: ForwardCost) -> ForwardCost:
        return ForwardCost(self.whole - other.whole, self.added - other.added)

    def __add__(self, other: ForwardCost) -> ForwardCost:
        return ForwardCost(self.whole + other.whole, self.added + other.added)


def bits_of(operations: int) -> Iterator[int]:
    """The numbers of the operations in a set."""
    return (i for i, bit in enumerate(reversed(f"{operations:b}")) if bit == "1")
