"""Turns what a probe measured into a selection. The same on every rank.

>>> choice = choose(probe, candidates={"model.norm.weight", "lm_head.weight"}, always=set(), rho=0.5)
>>> choice.selection.tensors, choice.selection.ratio
(frozenset({'lm_head.weight'}), 0.4998)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

from ..measuring.probe import Probe
from ..planning.graph import CostGraph
from ..planning.selection import Selection, everything_fits, select
from .parallel.ranks import mean_over_ranks, run_on_first_rank


NOT_FINITE = (
    "The loss or a gradient was not finite in a probe, so the selection stays as it was; the next step is a probe again. If "
    "this goes on, lower the learning rate or look for bad examples."
)
ALL_ZERO = (
    "Every gradient was zero in a probe (equal rewards, say), so the selection stays as it was; the next step is a probe "
    "again. If this goes on, check that the loss has a gradient."
)


@dataclass(frozen=True)
class Choice:
    """A selection, the cost graph that it was made with, and the importances."""

    selection: Selection
    graph: CostGraph
    importances: dict[str, float]


class UninformativeProbe(Exception):
    """Nothing can be chosen by what a probe measured; the message says why, and what to do."""


def choose(probe: Probe, candidates: Set[str], always: Set[str], rho: float) -> Choice:
    """Choose the candidates to train.

    Args:
        probe: one that is complete.
        candidates: what may be selected, tensors and low-rank forms.
        always: what is trained in any case, and counts.
        rho: the budget, a share of a full step's cost.

    Raises:
        UninformativeProbe: an importance is not finite, or all are zero.
        ValueError: `rho` is under the floor.
    """
    importances = mean_over_ranks(probe.importances())
    if not all(map(math.isfinite, importances.values())):
        raise UninformativeProbe(NOT_FINITE)

    def select_on_one_rank() -> tuple[CostGraph, Selection] | None:
        graph = probe.graph(candidates | always)
        # Where two batches disagree, an importance is small, and what else is left of the budget may go there.
        least = min((value for value in importances.values() if value > 0), default=0.0)
        if not (everything_fits(graph, rho) or least):
            return None
        raised = {name: max(importances[name], least) for name in graph.tensors if name in importances}
        # What is always trained and never got a gradient costs nothing in batches like these.
        return graph, select(graph, raised, rho, always=always & set(graph.tensors))

    chosen = run_on_first_rank(select_on_one_rank)
    if chosen is None:
        raise UninformativeProbe(ALL_ZERO)
    graph, selection = chosen
    return Choice(selection, graph, importances)


def everything_is_chosen(probe: Probe, offered: Set[str], rho: float) -> bool:
    """Whether the passes so far tell that all of what is offered fits the budget, so that importance does not matter."""
    return run_on_first_rank(
        lambda: not probe.reached().isdisjoint(offered) and everything_fits(probe.graph(offered), rho)
    )


def selection_state(selection: Selection) -> dict[str, Any]:
    """A selection as JSON."""
    return asdict(selection) | {"tensors": sorted(selection.tensors), "low_rank": sorted(selection.low_rank)}


def selection_from_state(state: Mapping[str, Any]) -> Selection:
    """The selection that `selection_state` gave this for; earlier versions kept no low-rank forms."""
    sets = {name: frozenset(state.get(name, ())) for name in ("tensors", "low_rank")}
    return Selection(**{**state, **sets})
