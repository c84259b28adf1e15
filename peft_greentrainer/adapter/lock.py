"""Keeps threads that run the same wrapper apart: each would take the swapped tensors of the other for its own.

>>> with layer._lock:
...     run_with_effective_tensors()
"""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """A reentrant lock that can be a part of a model: copies of it, and what is unpickled, are locks of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()
