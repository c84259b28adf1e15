"""Records every pass of a model in a training step, and has all of its parameters require grad in passes only.

    >>> watch = StepWatch(model, parameters, recorder, on_begin=print, on_gradient=recorder.operations.mark, ...)
    >>> Calls(model, watch.entered, watch.left).install(holders=[])
    >>> model(**batch).loss.backward()                # as the user's loop runs it
    >>> watch.close()

A pass may be entered anywhere (see `calls`), also inside of another one: a hook may run the model again, and so may a
custom function. What runs between a forward pass and the backward pass (a loss in the loop) is part of the forward pass.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backward_interception import open_watches
from .calls import Call
from .low_rank import LowRankForms
from .mode_stack import put_at_bottom, take_from_bottom
from .operations import ForwardCost
from .outputs import tensors_of
from .passes import RecordedPasses
from .recorder import CostRecorder


class StepWatch:
    """Records the passes of a model from `entered` to `close`, a step at a time.

    Args:
        model: the module whose passes are recorded.
        parameters: what gets a gradient in them, by name.
        recorder: what they are recorded with.
        on_begin: is called with the calls that have not returned, before the outermost is recorded.
        on_gradient: is called with the name of a parameter, or of a factor that does not exist yet, and its gradient.
        on_pass: is called after a backward pass that has given gradients.
        on_failure: is called after a backward pass that raised.
        forms: the low-rank forms of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        recorder: CostRecorder,
        *,
        on_begin: Callable[[list[Call]], None],
        on_gradient: Callable[[str, Tensor], None],
        on_pass: Callable[[], None],
        on_failure: Callable[[], None],
        forms: LowRankForms = LowRankForms(),
    ) -> None:
        self.model = model
        self._on_begin, self._on_gradient, self._on_pass, self._on_failure = on_begin, on_gradient, on_pass, on_failure
        self._passes = RecordedPasses(model, parameters, recorder, self._arrived, forms)
        self._opened = ExitStack()
        self._is_open = False
        self._recorded: list[_Recorded] = []
        # Forward passes that no backward pass has come from as yet, by their bit.
        self._waiting: dict[int, _Waiting] = {}
        self._next_bit = 1
        self._between_since: ForwardCost | None = None
        self._is_beginning = False
        self._backward_passes = 0
        self._has_gradients = False

    def close(self) -> None:
        """Forget forward passes that no backward pass came from. Nothing more is recorded until the next one."""
        for recorded in reversed(self._recorded):  # an interrupt has left them
            recorded.contexts.close()
        self._recorded.clear()
        self._stop_between()
        self.recorder.rests = self._between_since is not None
        for waiting in self._waiting.values():
            self.recorder.operations.take_back(waiting.cost)
        self._waiting.clear()
        self._opened.close()

    def begin_anew(self, recorder: CostRecorder) -> None:
        """Nothing of what was recorded means anything."""
        self._waiting.clear()
        self.close()
        self._passes.recorder = recorder

    @property
    def recorder(self) -> CostRecorder:
        return self._passes.recorder

    def freezes(self, parameter: nn.Parameter) -> bool:
        """Whether it requires grad in passes only."""
        return any(parameter is frozen for frozen in self._passes.frozen)

    # Forward passes

    def entered(self, running: list[Call]) -> None:
        """For `Calls`: record from here on what is entered from outside."""
        if self.recorder.runs_forward or self._is_beginning:
            return
        self._stop_between()
        has_gradients = torch.is_grad_enabled()
        if has_gradients:
            self._is_beginning = True
            try:
                self._on_begin(running)
            finally:
                self._is_beginning = False
        elif not self.model.training or any(_generates(call) for call in running):
            return
        self._open()
        owner = next(call for call in running if call.has_gradients == has_gradients)
        contexts = ExitStack()
        contexts.enter_context(self._passes.forward(origin=self._next_bit))
        self._recorded.append(_Recorded(owner, contexts, self._next_bit, self._cost))
        self._next_bit <<= 1

    def left(self, running: list[Call], output: Any) -> None:
        """For `Calls`: the last of these calls returns."""
        if self._recorded and self._recorded[-1].call is running[-1]:
            recorded = self._recorded.pop()
            recorded.contexts.close()
            self._wait_for_backward(recorded, output)
        if len(running) == 1 and self._waiting and not self._backward_passes:
            self._start_between()

    def _wait_for_backward(self, recorded: _Recorded, output: Any) -> None:
        """Notice when the graph of a forward pass is gone: without a backward pass, it does not count."""
        graph = _Graph(partial(self._is_reached, recorded.bit))
        tensors = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        # No tensor may be found in an output of any kind, or in one made without gradients: the turn's end tells then.
        has_failed = output is None and sys.exc_info()[0] is not None
        kept = None if tensors or has_failed else graph
        self._waiting[recorded.bit] = _Waiting(self._cost - recorded.before, kept)
        weakref.finalize(graph, self._graph_is_gone, recorded.bit).atexit = False
        for tensor in tensors:
            tensor.register_hook(graph)

    def _is_reached(self, bit: int) -> None:
        self._waiting.pop(bit, None)

    def _graph_is_gone(self, bit: int) -> None:
        if bit in self._waiting:
            was_between = self._stop_between()
            self.recorder.operations.take_back(self._waiting.pop(bit).cost)
            if not (self._waiting or self._recorded or self._backward_passes):
                self.close()
            elif was_between:
                self._start_between()

    @property
    def _cost(self) -> ForwardCost:
        return self.recorder.operations.forward

    def _start_between(self) -> None:
        """See what the loop runs between passes, with what comes from them."""
        if self._between_since is None:
            put_at_bottom(self.recorder)
            self._between_since = self._cost

    def _stop_between(self) -> bool:
        """What the loop has run since belongs to the last forward pass; false if the recorder was not there."""
        if self._between_since is None or not take_from_bottom(self.recorder):
            return False
        if self._waiting:
            last = next(reversed(self._waiting))
            waiting = self._waiting[last]
            self._waiting[last] = _Waiting(waiting.cost + (self._cost - self._between_since), waiting.graph)
        self._between_since = None
        self.recorder.rests = False
        return True

    # Backward passes

    @contextmanager
    def backward_pass(
        self, roots: list[Any], keeps_graph: bool, creates_graph: bool, inputs: list[Any] | None
    ) -> Iterator[list[nn.Parameter]]:
        """For any backward pass: it counts if it gives this model's parameters a gradient.

        Gives the parameters that are to get one too, if the pass is for some `inputs` only.
        """
        self._stop_between()
        origin = self._origin(roots)
        charged = roots if origin and inputs is None else []
        of_others = inputs is not None and not any(id(tensor) in self._passes.own for tensor in inputs)
        self._backward_passes += 1
        try:
            with self._passes.backward(charged, creates_graph, is_always_run=of_others and origin > 0):
                yield [] if of_others else self._passes.frozen
        except BaseException:
            if self._backward_passes == 1:
                self._has_gradients = False
                self._on_failure()
            raise
        finally:
            self._backward_passes -= 1
        self._count(origin)
        if self._backward_passes == 0 and not self._recorded:
            if self._has_gradients:
                self._has_gradients = False
                self._on_pass()
            if keeps_graph or self._waiting:
                self._start_between()

    @contextmanager
    def gradients(self, outputs: list[Any], inputs: list[Any]) -> Iterator[None]:
        """For gradients of activations: these cost the same whatever is trained. Those of parameters are not measured."""
        was_between = self._stop_between()
        of_parameters = any(id(tensor) in self._passes.own for tensor in inputs)
        try:
            if of_parameters or not (self._origin(outputs) or self.recorder.is_active):
                yield
            else:
                with self.recorder.backward(is_always_run=True):
                    yield
        finally:
            if was_between:
                self._start_between()

    def _origin(self, tensors: list[Any]) -> int:
        """The forward passes that these come from."""
        origin = 0
        for tensor in tensors:
            origin |= self.recorder.origin(tensor) if isinstance(tensor, Tensor) else 0
        return origin

    def _count(self, origin: int) -> None:
        """The forward passes that a backward pass came from do count."""
        for bit in list(self._waiting):
            if bit & origin:
                del self._waiting[bit]

    def _arrived(self, name: str, grad: Tensor) -> None:
        if self._backward_passes:
            self._has_gradients = True
            self._on_gradient(name, grad)

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        self._opened.callback(setattr, self, "_is_open", False)
        self._opened.enter_context(self._passes)
        open_watches.add(self)
        self._opened.callback(open_watches.discard, self)


def _generates(call: Call) -> bool:
    return getattr(call.function, "__name__", "") == "generate"


class _Recorded(NamedTuple):
    """A forward pass that is being recorded: by which call it was entered, and the cost before."""

    call: Call
    contexts: ExitStack
    bit: int
    before: ForwardCost


class _Waiting(NamedTuple):
    """A forward pass that no backward pass has come from, and its graph if nothing else keeps it."""

    cost: ForwardCost
    graph: _Graph | None


class _Graph:
    """A hook that lives as long as the graph of the tensors that it is registered on."""

    def __init__(self, reached: Callable[[], None]) -> None:
        self.reached = reached

    def __call__(self, grad: Tensor) -> None:
        self.reached()
