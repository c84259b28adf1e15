"""A probe: measures cost and importance inside an ordinary training step.

    >>> probe = Probe(model, parameters, measure=SameBatch("adam", rates={}))
    >>> probe.arm(enclosing_modules(model, nn.Module))
    >>> model(**batch).loss.backward()                # the next step, as the user's loop runs it
    >>> probe.end_turn()
    >>> probe.complete
    True
    >>> probe.disarm()                                # the model is as it was before
    >>> graph, importances = probe.graph(parameters), probe.importances()

In the passes of that step every tensor requires grad. The gradients of tensors that are not being trained are freed as they arrive,
so accumulated gradients, clipping and the optimizer see those of the trained ones, as always. With a `part` of the batch the
measurement is a pass of its own on that part, before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..planning.graph import CostGraph
from ..tensors.names import candidate_of
from .calls import Call, Calls
from .importance import Measure
from .low_rank import LowRankForms
from .operations import Operations
from .outputs import tensors_of
from .passes import loss_of, record
from .recorder import CostRecorder
from .seconds import PASSES, timed
from .step_watch import StepWatch


class BatchPart(Protocol):
    """A part of every batch, for a pass of its own that takes less memory."""

    def cut(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the model, for this part only."""

    def explained_errors(self) -> AbstractContextManager[None]:
        """For what runs on the part: lets an error in it say so."""


class Probe:
    """Measures the steps of a model until `batches` backward passes were seen, each step as a whole.

    Args:
        model: the module whose forward runs the step.
        parameters: what to measure, by name: for each tensor, the parameter that forward uses.
        measure: gives the importance of candidates by the gradient of a parameter; it is averaged over passes.
        batches: number of backward passes.
        part: measure on this part of each batch, in a pass of its own; None: on the whole batch, in the step itself.
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
        part: BatchPart | None = None,
        time_with: torch.optim.Optimizer | None = None,
        forms: LowRankForms = LowRankForms(),
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.measure = measure
        self.batches = batches
        self.part = part
        self.time_with = time_with
        self.passes = 0
        self.turns = 0
        self.forms = forms
        self.recorder = CostRecorder()
        self._timed: Operations | None = None
        self._sums: dict[str, Tensor | float] = {}
        self._passes_before = 0
        self._armed = ExitStack()
        self._watch = StepWatch(
            model,
            parameters,
            self.recorder,
            on_begin=self._time,
            on_gradient=self._arrived,
            on_pass=self._count,
            on_failure=self._begin_anew,
            forms=forms,
        )
        if part is None:
            self._calls = Calls(model, self._watch.entered, self._watch.left)
        else:
            self._calls = Calls(model, self._pass_of_its_own)
        self._in_own_pass = False
        self._passed: Call | None = None  # the last call that there was a pass for

    @property
    def complete(self) -> bool:
        return self.passes >= self.batches

    def cost_of_step(self, share: float) -> float:
        """What a probed step costs, in full steps, where it would cost `share` otherwise; at most, if counted in FLOPs.

        >>> Probe(model, parameters, measure=measure, part=FirstRows(1)).cost_of_step(0.5)    # and a pass on a row
        1.5
        """
        timing = 0 if self.time_with is None else 1 + 2 * PASSES
        return timing + (1.0 if self.part is None else 1.0 + share)

    def arm(self, holders: Iterable[nn.Module]) -> None:
        """Measure from the next forward pass with gradients on. Until then nothing is computed otherwise.

        `holders` are the modules that the model is a part of, see `enclosing_modules`.

        What this changes in the user's modules until `disarm`: see `Calls`, and what is compiled runs eagerly.
        """
        holders = list(holders)
        for module in [*self.model.modules(), *holders]:
            self._run_eagerly(module)
        self._armed.callback(self._watch.close)
        self._armed.callback(self._calls.remove)
        self._calls.install(holders)

    def _run_eagerly(self, module: nn.Module) -> None:
        """Replace what is compiled, by `module.compile()` or `torch.compile(module)`, by what it was compiled from.

        Compiled code neither sees hooks that are new nor has operations to record. `disarm` puts it back, so that steps in
        between run compiled; tests/training/test_loops.py holds what such a loop selects.
        """
        if module._compiled_call_impl is not None:
            self._armed.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
        compiled_from = module._modules.get("_orig_mod")
        if compiled_from is not None:  # made by torch.compile
            state = vars(module)
            self._armed.callback(state.__setitem__, "forward", state["forward"])
            state["forward"] = compiled_from.__call__

    def disarm(self) -> None:
        """Leave the model as it was before."""
        self._armed.close()

    def end_turn(self) -> None:
        """What comes next is another step, or another micro-batch."""
        self._watch.close()
        self._calls.running.clear()  # of what an interrupt may have left
        self._passed = None
        self.turns += self.passes > self._passes_before
        self._passes_before = self.passes

    def trained(self) -> list[str]:
        """The parameters that the step itself trains."""
        return [name for name, p in self.parameters.items() if p.requires_grad and not self._watch.freezes(p)]

    def reached(self) -> set[str]:
        """The candidates, and other tensors, that got a gradient so far and have a cost."""
        return set((self._timed or self.recorder.operations).needed_by)

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
            "recorder": self.recorder.operations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was measured; but what was timed is timed again, from the start."""
        if self.time_with is None:
            self.passes = self._passes_before = state["passes"]
            # Earlier versions kept neither.
            self.turns, self.batches = state.get("turns", self.passes), state.get("batches", self.batches)
            self._sums = dict(state["sums"])  # a number and a tensor add up in the type of the tensor
            self.measure.load_state_dict(state["measure"])
            self.recorder.operations.load_state_dict(state["recorder"])

    def graph(self, candidates: Iterable[str]) -> CostGraph:
        """The cost graph of one step, or of one micro-batch: the mean of what was recorded so far."""
        if self._timed is not None:
            return self._timed.graph(candidates)
        steps = self.turns if self.part is None else self.passes
        return self.recorder.operations.graph(candidates, steps=steps, has_updates=not self.forms.provisional)

    def importances(self) -> dict[str, float]:
        """The mean importance of each candidate over the passes so far."""
        return {name: float(total) / self.passes for name, total in self._sums.items()}

    def _count(self) -> None:
        self.passes += 1

    def _begin_anew(self) -> None:
        """What was recorded of a backward pass that was not finished means nothing: measure from the start."""
        self.recorder = CostRecorder()
        self._watch.begin_anew(self.recorder)
        self._sums.clear()
        self.measure.reset()
        self.passes = self.turns = self._passes_before = 0

    def _arrived(self, name: str, grad: Tensor) -> None:
        self.recorder.operations.mark(candidate_of(name), grad)
        for candidate, importance in self.measure(name, grad).items():
            self._sums[candidate] = self._sums.get(candidate, 0.0) + importance

    def _pass_of_its_own(self, running: list[Call]) -> None:
        assert self.part is not None
        call = self._of_whole_model(running)
        if call is None or call is self._passed or self.complete or self._in_own_pass or not torch.is_grad_enabled():
            return
        self._passed = call
        args, kwargs = self._arguments(call)
        with self.part.explained_errors():
            self._time(running)
            self._measure_on(lambda: loss_of(call.function(*args, **kwargs)))

    def _measure_on(self, loss: Callable[[], Tensor]) -> None:
        self._in_own_pass = True
        try:
            record(self.recorder, self.model, loss, self.parameters, self._arrived, self.forms)
            self._count()
        except BaseException:
            self._begin_anew()
            raise
        finally:
            self._in_own_pass = False

    def _of_whole_model(self, running: list[Call]) -> Call | None:
        """The outermost call of the model or of one of its methods, which can be repeated on some rows."""
        return next((call for call in running if call.module is self.model), None)

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (call.args, call.kwargs) if self.part is None else self.part.cut(call.args, call.kwargs)

    def _time(self, running: list[Call]) -> None:
        if self.time_with is None or self._timed is not None or self._in_own_pass:
            return
        call = self._of_whole_model(running) or running[0]
        args, kwargs = self._arguments(call)
        self._in_own_pass = True
        try:
            self._timed = timed(
                self.model, lambda: _scalar_of(call.function(*args, **kwargs)), self.parameters, self.time_with
            )
        finally:
            self._in_own_pass = False


def _scalar_of(output: Any) -> Tensor:
    """The loss; where the loop computes it outside the model, a scalar that takes about the same time to get."""
    try:
        return loss_of(output)
    except ValueError:
        first, *others = (tensor.float().mean() for tensor in tensors_of(output) if tensor.requires_grad)
        return sum(others, start=first)
