"""A probe: measures cost and importance inside an ordinary training step.

    >>> probe = Probe(model, parameters, measure=SameBatch("adam", rates={}))
    >>> probe.arm()
    >>> model(**batch).loss.backward()                # the next step, as the user's loop runs it
    >>> probe.complete
    True
    >>> probe.disarm()                                # the model is as it was before
    >>> graph, importances = probe.graph(parameters), probe.importances()

In that step every tensor requires grad. The gradients of tensors that are not being trained are freed as they arrive,
so accumulated gradients, clipping and the optimizer see those of the trained ones, as always. With `batch_size` the
measurement is a pass of its own on the first rows of the batch, before the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .around import around
from .backward import open_probes
from .cost import CostGraph
from .forms import candidate_of
from .low_rank_cost import LowRank, NoticeLowRank
from .measure import Measure
from .passes import free_gradient, loss_of, record
from .recorder import CostRecorder, tensors_in
from .rows import first_rows, say_of_rows
from .seconds import PASSES, TimedRecorder, timed


class Probe:
    """Measures the next `batches` forward and backward passes of a model.

    Args:
        model: the module whose forward runs the step.
        parameters: what to measure, by name: for each tensor, the parameter that forward uses.
        measure: gives the importance of candidates by the gradient of a parameter; it is averaged over passes.
        batches: number of forward and backward passes.
        batch_size: measure on so many rows, in a pass of its own; None: on the whole batch, in the step itself.
        time_with: for a cost in seconds, the optimizer that takes the steps: operations are timed before the first pass, in
            a few of their own. None: the cost is in FLOPs.
        forms: the low-rank forms of the model, whose cost is noted too.

    A forward pass whose graph is dropped without a backward pass (a validation with gradients on, a skipped batch) does
    not count, and the model is as it was before once the graph is gone.
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
        self.forms = forms
        self.recorder = CostRecorder(forms, self._measured)
        self._timed: TimedRecorder | None = None
        self._sums: dict[str, Tensor | float] = {}
        self._armed = ExitStack()
        self._opened = ExitStack()
        self._recording = ExitStack()
        self._graphs: dict[int, tuple[int, int]] = {}
        self._is_open = False
        self._frozen: list[nn.Parameter] = []
        self._arrived_now = False
        self._in_own_pass = False

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
        before = _Hook(self._before_forward if self.batch_size is None else self._pass_of_its_own)
        self._armed.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        if self.batch_size is None:
            after = _Hook(self._after_forward)
            self._armed.callback(self.model.register_forward_hook(after, always_call=True).remove)
        for module in [*self.model.modules(), *around(self.model, nn.Module)]:
            self._run_eagerly(module)

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
        self.close()

    def close(self) -> None:
        """Let nothing require grad but what is trained, until the next forward pass."""
        self._opened.close()

    def trained(self) -> list[str]:
        """The parameters that the step itself trains."""
        only_measured = set(map(id, self._frozen))
        return [name for name, p in self.parameters.items() if p.requires_grad and id(p) not in only_measured]

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as JSON."""
        sums = {name: float(total) for name, total in self._sums.items()}
        kept, recorded = self.measure.state_dict(), self.recorder.state_dict()
        return {"passes": self.passes, "sums": sums, "measure": kept, "recorder": recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was measured; but what was timed is timed again, from the start."""
        if self.time_with is None:
            self.passes = state["passes"]
            self._sums = dict(state["sums"])  # a number and a tensor add up in the type of the tensor
            self.measure.load_state_dict(state["measure"])
            self.recorder.load_state_dict(state["recorder"])

    def graph(self, candidates: Iterable[str]) -> CostGraph:
        """The cost graph of the passes so far."""
        return CostGraph.of(self._timed or self.recorder, candidates)

    def importances(self) -> dict[str, float]:
        """The mean importance of each candidate over the passes so far."""
        return {name: float(total) / self.passes for name, total in self._sums.items()}

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self.complete and not self._in_own_pass:  # not an evaluation, say
            self._time(module, args, kwargs)
            self._open()
            self._forward_costs_before = self.recorder.forward_cost, self.recorder.added_forward_cost
            self._recording.enter_context(self.recorder.forward())
            self._recording.callback(self._watch)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._output = output
        self._recording.close()
        del self._output

    def _watch(self) -> None:
        """Notice when the graph of this forward pass is gone: without a backward pass, it does not count."""
        before, added_before = self._forward_costs_before
        graph = _Graph()
        self._graphs[id(graph)] = self.recorder.forward_cost - before, self.recorder.added_forward_cost - added_before
        weakref.finalize(graph, self._graph_is_gone, id(graph), self.recorder).atexit = False
        for tensor in _tensors(self._output):
            if tensor.requires_grad:
                tensor.register_hook(graph)

    def _graph_is_gone(self, graph: int, recorder: CostRecorder) -> None:
        cost, added = self._graphs.pop(graph, (0, 0))
        recorder.forward_cost -= cost
        recorder.added_forward_cost -= added
        if not self._graphs:
            self.close()

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        self._opened.callback(setattr, self, "_is_open", False)
        self._opened.callback(self._frozen.clear)
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                self._frozen.append(parameter)
                parameter.requires_grad_(True)
                self._opened.callback(parameter.requires_grad_, False)
                self._opened.callback(parameter.register_post_accumulate_grad_hook(free_gradient).remove)
            self._opened.callback(parameter.register_hook(partial(self._arrived, name)).remove)
        self._opened.enter_context(NoticeLowRank(self.recorder))
        open_probes.add(self)
        self._opened.callback(open_probes.discard, self)

    def reopen(self) -> None:
        """Let everything require grad again, should an adapter have been set in between, as trl does for a reference."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def backward_is_done(self) -> None:
        """One backward pass was recorded; it counts if it was one of this model."""
        if self._arrived_now:
            self._arrived_now = False
            self._graphs = dict.fromkeys(self._graphs, (0, 0))
            self.passes += 1

    def backward_failed(self) -> None:
        """What was recorded of a backward pass that was not finished means nothing: measure from the start."""
        self.recorder = CostRecorder(self.forms, self._measured)
        self._graphs = dict.fromkeys(self._graphs, (0, 0))
        self.close()  # what it has opened notes down in the old recorder
        self._sums.clear()
        self.measure.reset()
        self.passes = 0
        self._arrived_now = False

    def _arrived(self, name: str, grad: Tensor) -> None:
        if grad is None:  # a custom function gave none
            return
        self._arrived_now = True
        self.recorder.mark(candidate_of(name), grad)
        self._measured(name, grad)

    def _measured(self, name: str, grad: Tensor) -> None:
        for candidate, measured in self.measure(name, grad).items():
            self._sums[candidate] = self._sums.get(candidate, 0.0) + measured

    def _pass_of_its_own(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.complete or self._in_own_pass or not torch.is_grad_enabled():
            return
        args, kwargs = first_rows(args, kwargs, self.batch_size)
        with say_of_rows(self.batch_size):
            self._measure_on(module, args, kwargs)

    def _measure_on(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._time(module, args, kwargs)
        self._in_own_pass = True
        try:
            record(self.recorder, module, lambda: loss_of(module(*args, **kwargs)), self.parameters, self._arrived)
            self.backward_is_done()
        except BaseException:
            self.backward_failed()
            raise
        finally:
            self._in_own_pass = False

    def _time(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.time_with is not None and self._timed is None:
            self._in_own_pass = True
            try:
                self._timed = timed(
                    module, lambda: _scalar_of(module(*args, **kwargs)), self.parameters, self.time_with
                )
            finally:
                self._in_own_pass = False


class _Hook:
    """A hook of a module of which copies, and what is unpickled, do nothing: the probe is of this module only."""

    def __init__(self, method: Callable[..., None]) -> None:
        self.method = method

    def __call__(self, *args: Any) -> None:
        self.method(*args)

    def __reduce__(self) -> tuple:
        return _Hook, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    pass


class _Graph:
    """A hook that does nothing, and lives as long as the graph of the tensors that it is registered on."""

    def __call__(self, grad: Tensor) -> None:
        pass


def _scalar_of(output: Any) -> Tensor:
    """The loss; where the loop computes it outside the model, a scalar that takes about the same time to get."""
    try:
        return loss_of(output)
    except ValueError:
        return sum(tensor.float().mean() for tensor in _tensors(output) if tensor.requires_grad)


def _tensors(output: Any) -> list[Tensor]:
    return tensors_in(output.values() if isinstance(output, Mapping) else (output,))
