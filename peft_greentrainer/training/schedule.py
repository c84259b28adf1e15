"""When is a selection due: after so many steps, in every epoch, or once?

>>> schedule = Schedule.from_setting(1000)
>>> schedule.is_due(schedule.count(step=1998, epoch=None), last=1000)
False
>>> schedule.is_due(schedule.count(step=1999, epoch=None), last=1000)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """
    Attributes:
        unit: what is counted.
        interval: so many of them lie between two selections.
    """

    unit: Literal["step", "epoch"]
    interval: float

    @classmethod
    def from_setting(cls, reselect: int | str) -> Schedule:
        """The schedule that the config's `reselect` asks for: a number of steps, `"epoch"` or `"once"`."""
        if reselect == "epoch":
            return cls("epoch", 1)
        return cls("step", math.inf if reselect == "once" else float(reselect))

    def count(self, step: int, epoch: int | None) -> int:
        """What was reached when this step was taken: the step itself, or its epoch.

        Raises:
            ValueError: the epoch is counted and not given.
        """
        if self.unit == "step":
            return step
        if epoch is None:
            raise ValueError(
                "reselect='epoch' has to know the epoch: call update_and_allocate(step, optimizer, epoch=epoch), or set "
                "reselect to a number of steps."
            )
        return epoch

    def is_due(self, count: int, last: int) -> bool:
        """Whether the next step has to be a probe.

        Args:
            count: what was reached now.
            last: what was reached when the last selection was made.
        """
        ahead = (
            1 if self.unit == "step" else 0
        )  # the selection is made in the next step, which may be of the same epoch
        return count + ahead - last >= self.interval
