"""What a probe was to reach and did not: an image encoder on a batch of text, an expert that no token was sent to.

    >>> unreached = Unreached()
    >>> unreached.count_probed_step(probe, {"vision.weight", "head.weight"}, provisional=False)   # probe the next one too
    True
    >>> unreached.missing
    ['vision.weight']

Its cost is not known, so that nothing can be selected that keeps the budget. But it may never come: after some steps in a row
it is not waited for any longer, until a probe sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ..measuring.probe import Probe
from ..tensors.names import OUTSIDE, candidate_of
from .parallel.ranks import gather


# So many steps in a row are probed before a selection is made without what no gradient came to.
PATIENCE = 10

NO_CANDIDATE = (
    "The loss of a probe reached no candidate tensor, so the selection stays as it was; the next step is a probe too. If this "
    "goes on, check that the loss depends on what target_modules names."
)


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
        self._told: set[str] = set()

    def count_probed_step(self, probe: Probe, own: Set[str], provisional: bool) -> bool:
        """Count a step that was probed, and tell whether to wait: to probe the next one too. The same on every rank.

        Args:
            probe: what it has reached so far, on this rank.
            own: the candidates.
            provisional: whether what is trained now was selected from sizes, and may never get a gradient.
        """
        expected = _expected(probe, own, provisional)
        reached = probe.reached() & (own | expected)
        self.given_up -= reached
        missing = (expected | self.seen) - reached - self.given_up
        ranks = gather((sorted(missing), bool(reached & own)))
        self.missing = ranks[0][0]
        reach_any = [reaches_any for _, reaches_any in ranks]  # where one reaches none, nothing can be selected at all
        self.waited += 1
        if not reach_any[0] or (self.waited < PATIENCE and (self.missing or not all(reach_any))):
            return True
        self.given_up |= set(self.missing)
        self.seen |= reached
        self.waited = 0
        return False

    def take_warning(self) -> str | None:
        """What to tell the user after a step in vain; what was told of is not told of again."""
        if not self.missing:
            return NO_CANDIDATE
        new = [name for name in self.missing if name not in self._told]
        self._told.update(new)
        if not new:
            return None
        return (
            f"A probe saw no gradient of {', '.join(new[:3])}{' ...' if len(new) > 3 else ''}, so the cost of training that "
            f"is not known. The selection stays as it was, and the next step is a probe too, up to {PATIENCE} in a row; then "
            "what was seen is selected from."
        )

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"seen": sorted(self.seen), "given_up": sorted(self.given_up), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.given_up, self.waited = set(state["seen"]), set(state["given_up"]), state["waited"]


def _expected(probe: Probe, own: Set[str], provisional: bool) -> set[str]:
    """What every step trains, and a probe is to reach."""
    trained = set(probe.trained())
    # A model around the base may be of an earlier training, and is not waited for.
    always = {name for name in trained if candidate_of(name) not in own and not name.startswith(OUTSIDE)}
    # A provisional selection is made from sizes, and may have tensors that never get a gradient.
    return always if provisional else always | ({candidate_of(name) for name in trained} & own)
