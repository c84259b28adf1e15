"""Seconds instead of FLOPs: the time that every operation takes, and the optimizer's own pass over each tensor.

    >>> graph = profile(model, batch, unit="seconds")
    >>> graph.seconds(graph.tensors[-9:]) / graph.seconds(graph.tensors)
    0.31

FLOPs ignore norms, softmax, elementwise operations and the optimizer, and what a matrix product of one shape takes longer
than one of another. Times are those of this machine, with what runs beside; so passes are repeated, and the median counts.

On the CPU, memory that a step frees goes back to the system unless the allocator keeps it, and then a quarter of the next
step, more or less, is spent on getting it again: with glibc, set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .forced_gradients import NoticeForcedGradient
from .low_rank import LowRank
from .passes import record
from .recorder import CostRecorder


# So many passes are timed as a whole, and so many operation by operation; one more before them warms up.
PASSES = 3
# The optimizer is timed on tensors of these sizes, so many of each: what it takes per tensor, and per weight.
SMALL, LARGE = (256, 64), (16, 2**20)


class TimedRecorder(CostRecorder):
    """Notes nanoseconds. Operations are waited for, so on an accelerator their launches do not overlap."""

    unit = "seconds"

    @contextmanager
    def forward(self) -> Iterator[None]:
        # A kernel that runs only where a bias is frozen is not seen while everything is trained, so it has no time.
        with self, NoticeForcedGradient(self):
            yield

    def run(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int]:
        start = _now()
        out = func(*args, **kwargs)
        return out, _now() - start

    def charge_always(self, grad: Tensor) -> None:
        self.force(grad)  # the forward pass is timed as a whole


class Stopwatch:
    """Times a pass as a whole, where a recorder would look into it."""

    forward_cost = backward_cost = 0
    forms = LowRank()

    def mark(self, name: str, grad: Tensor) -> None:
        pass

    def charge_always(self, grad: Tensor) -> None:
        pass

    @contextmanager
    def forward(self) -> Iterator[None]:
        start = _now()
        yield
        self.forward_cost = _now() - start

    def __enter__(self) -> None:
        self._start = _now()

    def __exit__(self, *exception: Any) -> None:
        self.backward_cost = _now() - self._start


def timed(
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> TimedRecorder:
    """Record some passes of the model in which all these parameters get a gradient; costs are medians, in nanoseconds.

    Args:
        loss: runs the forward pass.
        optimizer: the optimizer whose pass over each tensor is added; None: `torch.optim.AdamW`.
    """
    like = next(iter(parameters.values()))
    if like.device.type == "meta":
        raise ValueError("On the meta device nothing runs, so there are no seconds: use unit='flops'.")
    warm_up = Stopwatch()
    record(warm_up, model, loss, parameters, warm_up.mark)
    recorders, whole = [], []
    for _ in range(PASSES):
        for recorder, kept in ((Stopwatch(), whole), (TimedRecorder(), recorders)):
            record(recorder, model, loss, parameters, recorder.mark)
            kept.append(recorder)

    # Routing that depends on chance may run other operations each time; then the last pass has to do.
    if len({len(r.costs) for r in recorders}) == 1:
        recorder.costs = np.median([r.costs for r in recorders], axis=0).tolist()
    # What passes between operations, or on an accelerator overlaps: the interpreter, the engine of autograd.
    share = median(w.backward_cost for w in whole) / max(1, sum(recorder.costs))
    recorder.costs = [round(share * cost) for cost in recorder.costs]
    recorder.forward_cost = median(w.forward_cost for w in whole)
    per_tensor, per_weight = optimizer_seconds(optimizer, like)
    for name in recorder.needed_by:
        nanoseconds = 1e9 * (per_tensor + per_weight * parameters[name].numel())
        recorder.needed_by[name] |= recorder.new_operation(round(nanoseconds))
    return recorder


def optimizer_seconds(optimizer: torch.optim.Optimizer | None, like: Tensor) -> tuple[float, float]:
    """Seconds that a step of this optimizer takes for every tensor, and for every weight.

        >>> per_tensor, per_weight = optimizer_seconds(None, like=torch.empty(0))
        >>> per_weight * 135e6
        0.27

    Args:
        optimizer: another one of its class, with its defaults, is timed; None: `torch.optim.AdamW`.
        like: a tensor of the type and on the device of those to be trained.
    """
    per_step = []
    for count, weights in (SMALL, LARGE):
        tensors = [nn.Parameter(torch.zeros(weights, dtype=like.dtype, device=like.device)) for _ in range(count)]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        scratch = _another(optimizer, tensors)
        scratch.step()  # makes the moments
        times = []
        for _ in range(PASSES):
            start = _now()
            scratch.step()
            times.append((_now() - start) / 1e9)
        per_step.append(median(times))
    (small, few), (large, many) = SMALL, LARGE
    per_weight = per_step[1] / (large * many)
    return max(0.0, per_step[0] / small - per_weight * few), per_weight


def _another(optimizer: torch.optim.Optimizer | None, tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    if optimizer is not None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        try:
            return type(optimizer)(tensors, **optimizer.defaults)
        except TypeError:  # a class whose defaults are not its arguments
            pass
    return torch.optim.AdamW(tensors)


def _now() -> int:
    """Nanoseconds, once all that was launched is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter_ns()
