"""Records every backward pass while a probe is open, whoever starts it.

>>> open_probes.add(probe)                        # torch.autograd.backward is ours now ...
>>> open_probes.discard(probe)                    # ... and is torch's again
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .probe import Probe


class OpenProbes(weakref.WeakSet):
    """Records every backward pass while it is not empty.

    Nothing tells when a backward pass begins, but whoever starts one goes through `torch.autograd.backward`.
    """

    def add(self, probe: Probe) -> None:
        if not self:
            self._backward = torch.autograd.backward
            torch.autograd.backward = self._recorded
        super().add(probe)

    def discard(self, probe: Probe) -> None:
        super().discard(probe)
        if not self:
            torch.autograd.backward = self._backward

    def _recorded(self, *args: Any, **kwargs: Any) -> None:
        nested = torch._C._current_graph_task_id() != -1  # reentrant checkpointing
        recording = [] if nested else [probe for probe in self if not probe.complete]
        try:
            with ExitStack() as modes:
                for probe in recording:
                    probe.reopen()
                    modes.enter_context(probe.recorder)
                self._backward(*args, **kwargs)
        except BaseException:
            for probe in recording:
                probe.backward_failed()
            raise
        for probe in recording:
            probe.backward_is_done()


open_probes = OpenProbes()
