"""What a probe was to reach and did not: an image encoder on a batch of text, an expert that no token was sent to.

    >>> unreached = Unreached()
    >>> unreached.waits(expected={"merger.weight"}, reached={"head.weight"}, reaches_any=True)   # probe the next step too
    True

Its cost is not known, so that nothing can be selected that keeps the budget. But it may never come: after some steps in a row
it is not waited for any longer, until a probe sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from .parallel.ranks import of_all_ranks


# So many steps in a row are probed before a selection is made without what no gradient came to.
PATIENCE = 10


class Unreached:
    """
    Attributes:
        seen: what some probe has reached.
        given_up: what is not waited for.
        waited: number of steps that were probed in vain, in a row.
        missing: what the last probe did not reach, on the first rank, whose cost graph is selected from.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.given_up: set[str] = set()
        self.waited = 0
        self.missing: list[str] = []

    def waits(self, expected: Set[str], reached: Set[str], reaches_any: bool) -> bool:
        """Whether the next step is to be probed too; the same on every rank.

        Args:
            expected: what is trained in every step.
            reached: what got a gradient, on this rank.
            reaches_any: whether a candidate did; where there is none on some rank, nothing can be selected at all.
        """
        self.given_up -= reached
        missing = (expected | self.seen) - reached - self.given_up
        of_ranks = of_all_ranks((sorted(missing), reaches_any))
        self.missing = of_ranks[0][0]
        reach_any = [of_rank[1] for of_rank in of_ranks]
        self.waited += 1
        if not reach_any[0] or (self.waited < PATIENCE and (self.missing or not all(reach_any))):
            return True
        self.given_up |= set(self.missing)
        self.seen |= reached
        self.waited = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"seen": sorted(self.seen), "given_up": sorted(self.given_up), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.given_up, self.waited = set(state["seen"]), set(state["given_up"]), state["waited"]
