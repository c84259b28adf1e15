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
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from .forced_gradients import NoticeForcedGradient
from .importance import unwrapped
from .operations import Operations
from .passes import record
from .recorder import CostRecorder


# So many passes are timed as a whole, and so many operation by operation; one more before them warms up.
PASSES = 3
# The optimizer is timed on tensors of these sizes, so many of each: what it takes per tensor, and per weight.
SMALL, LARGE = (256, 64), (16, 2**20)


class TimedOperations(Operations):
    """Operations in nanoseconds, of a pass that is also timed as a whole."""

    unit = "seconds"

    def charge_always(self, grad: Tensor) -> None:
        self.force(grad)  # the time of the forward pass becomes that of the whole one


class TimedRecorder(CostRecorder):
    """Notes nanoseconds. Operations are waited for, so on an accelerator their launches do not overlap."""

    def _new_operations(self) -> TimedOperations:
        return TimedOperations()

    def _among_modes(self) -> AbstractContextManager[Any]:
        return self  # on top: what modes of the user's take is part of every step

    def _modes_of_forward(self) -> list[TorchFunctionMode]:
        # A kernel that runs only where a bias is frozen is not seen while everything is trained, so it has no time.
        return [NoticeForcedGradient(self.operations)]

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        start = _now()
        out = func(*args, **kwargs)
        return out, _now() - start


class Stopwatch(CostRecorder):
    """Times passes as a whole, where any other recorder looks into them.

    Attributes:
        forward_cost: nanoseconds of the last forward pass.
        backward_cost: nanoseconds of the last backward pass.
    """

    forward_cost = backward_cost = 0

    @contextmanager
    def forward(self, origin: int = 0) -> Iterator[None]:
        start = _now()
        yield
        self.forward_cost = _now() - start

    @contextmanager
    def backward(self, creates_graph: bool = False, is_always_run: bool = False) -> Iterator[None]:
        start = _now()
        yield
        self.backward_cost = _now() - start


def timed(
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> Operations:
    """The operations of a pass in which all these parameters get a gradient; costs are medians of some, in nanoseconds.

    Args:
        model: the module whose passes these are. It is left as it was.
        loss: runs the forward pass and gives the scalar loss.
        parameters: what gets a gradient, by name.
        optimizer: the optimizer whose pass over each tensor is added; None: `torch.optim.AdamW`.

    Raises:
        ValueError: on the `meta` device.
    """
    like = next(iter(parameters.values()))
    if like.device.type == "meta":
        raise ValueError("On the meta device nothing runs, so there are no seconds: use unit='flops'.")

    def stopped() -> Stopwatch:
        stopwatch = Stopwatch()
        record(stopwatch, model, loss, parameters, on_gradient=lambda name, grad: None)
        return stopwatch

    stopped()  # warms up
    whole, recorded = [], []
    for _ in range(PASSES):
        whole.append(stopped())
        recorder = TimedRecorder()
        record(recorder, model, loss, parameters, recorder.operations.mark)
        recorded.append(recorder.operations)

    operations = recorded[-1]
    # Routing that depends on chance may run other operations each time; then the last pass has to do.
    if len({len(each.costs) for each in recorded}) == 1:
        operations.costs = np.median([each.costs for each in recorded], axis=0).tolist()
    # What passes between operations, or on an accelerator overlaps: the interpreter, the engine of autograd.
    share = median(stopwatch.backward_cost for stopwatch in whole) / max(1, sum(operations.costs))
    operations.costs = [round(share * cost) for cost in operations.costs]
    operations.forward_cost = round(median(stopwatch.forward_cost for stopwatch in whole))
    per_tensor, per_weight = optimizer_seconds(optimizer, like)
    for name in operations.needed_by:
        nanoseconds = 1e9 * (per_tensor + per_weight * parameters[name].numel())
        operations.needed_by[name] |= operations.new_operation(round(nanoseconds))
    return operations


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
        optimizer = unwrapped(optimizer)
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
