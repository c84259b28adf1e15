"""The cost graph of what was recorded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ..planning.graph import CostGraph
from ..tensors.names import is_low_rank
from .recorder import CostRecorder, bits_of


def graph_of(recorder: CostRecorder, candidates: Iterable[str]) -> CostGraph:
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
    graph = CostGraph(
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
