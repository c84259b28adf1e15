"""Warnings that are given once in a training, in however many steps there is a reason for them.

>>> warn_once = WarnOnce()
>>> warn_once("The loss is not finite.")
UserWarning: The loss is not finite.
>>> warn_once("The loss is not finite.")
"""

from __future__ import annotations

import warnings


class WarnOnce:
    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str) -> None:
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, stacklevel=3)
