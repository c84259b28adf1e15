"""A probe: measures cost and importance inside an ordinary training step.

    >>> probe = Probe(model, parameters, measure=SameBatch("adam", rates={}))
    >>> probe.arm()
    >>> model(**batch).loss.backward()                # the next step, as the user's loop runs it
    >>> probe.end_turn()
    >>> probe.complete
    True
    >>> probe.disarm()                                # the model is as it was before
    >>> graph, importances = probe.graph(parameters), probe.importances()

In the passes of that step every tensor requires grad. The gradients of tensors that are not being trained are freed as they arrive,
so accumulated gradients, clipping and the optimizer see those of the trained ones, as always. With `batch_size` the
measurement is a pass of its own on the first rows of the batch, before the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..planning.graph import CostGraph
from ..tensors.names import candidate_of
from .enclosing import around
from .entries import Entries, Entry
from .first_rows import first_rows, say_of_rows
from .low_rank import LowRank
from .measure import Measure
from .operations import graph_of
from .outputs import tensors_of
from .passes import loss_of, record
from .recorder import CostRecorder
from .seconds import PASSES, TimedRecorder, timed
from .step_watch import StepWatch


class Probe:
    """Measures the steps of a model until `batches` backward passes were seen, each step as a whole.

    Args:
        model: the module whose forward runs the step.
        parameters: what to measure, by name: for each tensor, the parameter that forward uses.
        measure: gives the importance of candidates by the gradient of a parameter; it is averaged over passes.
        batches: number of backward passes.
        batch_size: measure on so many rows, in a pass of its own; None: on the whole batch, in the step itself.
        time_with: for a cost in seconds, the optimizer that takes the steps: operations are timed before the first pass, in
            a few of their own. None: the cost is in FLOPs.
        forms: the low-rank forms of the model, whose cost is noted too.

    Every pass until `end_turn` counts. A forward pass whose graph is dropped without a backward pass (a validation with
    gradients on, a skipped batch) does not, and the model is as it was before once the graph is gone.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        measure: Measure,
        batches: int = 1,
        batch_size: int | None = None,
        time_with: torch.optim.Optimizer | None = None,
        forms: LowRank = LowRank(),
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.measure = measure
        self.batches = batches
        self.batch_size = batch_size
        self.time_with = time_with
        self.passes = 0
        self.turns = 0
        self.forms = forms
        self.recorder = CostRecorder(forms, self._measured)
        self._timed: TimedRecorder | None = None
        self._sums: dict[str, Tensor | float] = {}
        self._passes_before = 0
        self._armed = ExitStack()
        self._watch = StepWatch(
            model,
            parameters,
            self.recorder,
            begins=self._time,
            on_gradient=self._arrived,
            on_pass=self._count,
            on_failure=self._begin_anew,
        )
        if batch_size is None:
            self._entries = Entries(model, self._watch.entered, self._watch.left)
        else:
            self._entries = Entries(model, self._pass_of_its_own)
        self._in_own_pass = False
        self._passed: Entry | None = None  # the last call that there was a pass for

    @property
    def complete(self) -> bool:
        return self.passes >= self.batches

    def price(self, share: float) -> float:
        """What a probed step costs, in full steps, where it would cost `share` otherwise; at most, if counted in FLOPs.

        >>> Probe(model, parameters, measure=measure, batch_size=1).price(0.5)   # the step, and a pass on some rows
        1.5
        """
        timing = 0 if self.time_with is None else 1 + 2 * PASSES
        return timing + (1.0 if self.batch_size is None else 1.0 + share)

    def arm(self) -> None:
        """Measure from the next forward pass with gradients on. Until then nothing changes."""
        holders = around(self.model, nn.Module)
        for module in [*self.model.modules(), *holders]:
            self._run_eagerly(module)
        self._armed.callback(self._watch.close)
        self._armed.callback(self._entries.remove)
        self._entries.install(holders)

    def _run_eagerly(self, module: nn.Module) -> None:
        """What is compiled neither sees hooks that are new nor has operations to record."""
        if module._compiled_call_impl is not None:
            self._armed.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
        if "_orig_mod" in module._modules:  # made by torch.compile
            state = vars(module)
            self._armed.callback(state.__setitem__, "forward", state["forward"])
            state["forward"] = module._orig_mod.__call__

    def disarm(self) -> None:
        """Leave the model as it was before."""
        self._armed.close()

    def end_turn(self) -> None:
        """What comes next is another step, or another micro-batch."""
        self._watch.close()
        self._entries.running.clear()  # of what an interrupt may have left
        self._passed = None
        self.turns += self.passes > self._passes_before
        self._passes_before = self.passes

    def trained(self) -> list[str]:
        """The parameters that the step itself trains."""
        return [name for name, p in self.parameters.items() if p.requires_grad and not self._watch.only_measures(p)]

    def reached(self) -> set[str]:
        """The candidates, and other tensors, that got a gradient so far and have a cost."""
        return set((self._timed or self.recorder).needed_by)

    def go_on(self) -> None:
        """Measure the next step too; what was timed is timed anew, in passes like that step's."""
        self.batches = self.passes + 1
        self._timed = None

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as JSON."""
        return {
            "batches": self.batches,
            "passes": self.passes,
            "turns": self.turns,
            "sums": {name: float(total) for name, total in self._sums.items()},
            "measure": self.measure.state_dict(),
            "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was measured; but what was timed is timed again, from the start."""
        if self.time_with is None:
            self.passes = self._passes_before = state["passes"]
            # Earlier versions kept neither.
            self.turns, self.batches = state.get("turns", self.passes), state.get("batches", self.batches)
            self._sums = dict(state["sums"])  # a number and a tensor add up in the type of the tensor
            self.measure.load_state_dict(state["measure"])
            self.recorder.load_state_dict(state["recorder"])

    def graph(self, candidates: Iterable[str]) -> CostGraph:
        """The cost graph of one step, or of one micro-batch: the mean of what was recorded so far."""
        if self._timed is not None:
            return graph_of(self._timed, candidates)
        parts = self.turns if self.batch_size is None else self.passes
        graph = graph_of(self.recorder, candidates)
        return replace(
            graph,
            forward_cost=graph.forward_cost // parts,
            full_cost=graph.full_cost // parts,
            costs=graph.costs // parts,
            forced_cost=graph.forced_cost // parts,
        )

    def importances(self) -> dict[str, float]:
        """The mean importance of each candidate over the passes so far."""
        return {name: float(total) / self.passes for name, total in self._sums.items()}

    def _count(self) -> None:
        self.passes += 1

    def _begin_anew(self) -> None:
        """What was recorded of a backward pass that was not finished means nothing: measure from the start."""
        self.recorder = CostRecorder(self.forms, self._measured)
        self._watch.begin_anew(self.recorder)
        self._sums.clear()
        self.measure.reset()
        self.passes = self.turns = self._passes_before = 0

    def _arrived(self, name: str, grad: Tensor) -> None:
        self.recorder.mark(candidate_of(name), grad)
        self._measured(name, grad)

    def _measured(self, name: str, grad: Tensor) -> None:
        for candidate, measured in self.measure(name, grad).items():
            self._sums[candidate] = self._sums.get(candidate, 0.0) + measured

    def _pass_of_its_own(self, running: list[Entry]) -> None:
        entry = self._of_whole_model(running)
        if self.complete or self._in_own_pass or entry in (None, self._passed) or not torch.is_grad_enabled():
            return
        self._passed = entry
        args, kwargs = first_rows(entry.args, entry.kwargs, self.batch_size)
        with say_of_rows(self.batch_size):
            self._time(running)
            self._measure_on(entry, args, kwargs)

    def _measure_on(self, entry: Entry, args: tuple, kwargs: dict[str, Any]) -> None:
        self._in_own_pass = True
        try:
            record(
                self.recorder, self.model, lambda: loss_of(entry.call(*args, **kwargs)), self.parameters, self._arrived
            )
            self._count()
        except BaseException:
            self._begin_anew()
            raise
        finally:
            self._in_own_pass = False

    def _of_whole_model(self, running: list[Entry]) -> Entry | None:
        """The outermost call of the model or of one of its methods, which can be repeated on some rows."""
        return next((entry for entry in running if entry.module is self.model), None)

    def _time(self, running: list[Entry]) -> None:
        if self.time_with is None or self._timed is not None or self._in_own_pass:
            return
        entry = self._of_whole_model(running) or running[0]
        args, kwargs = entry.args, entry.kwargs
        if self.batch_size is not None:
            args, kwargs = first_rows(args, kwargs, self.batch_size)
        self._in_own_pass = True
        try:
            self._timed = timed(
                self.model, lambda: _scalar_of(entry.call(*args, **kwargs)), self.parameters, self.time_with
            )
        finally:
            self._in_own_pass = False


def _scalar_of(output: Any) -> Tensor:
    """The loss; where the loop computes it outside the model, a scalar that takes about the same time to get."""
    try:
        return loss_of(output)
    except ValueError:
        return sum(tensor.float().mean() for tensor in tensors_of(output) if tensor.requires_grad)
