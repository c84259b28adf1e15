"""Records what a backward pass costs, and which of its operations each gradient needs.

The ancestors of a tensor's gradient among the costed operations are exactly what autograd runs when that tensor is
trained. So the dataflow of one pass in which every tensor is trained tells the cost of training any of them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .attention_bias import NoticeTrainedBias
from .forced_gradients import NoticeForcedGradient
from .formulas import FlopFormulas
from .mode_stack import at_bottom
from .operations import Operations
from .recomputation import is_recomputing


_numbers = itertools.count()


class CostRecorder(TorchDispatchMode):
    """Records what the forward pass costs and the dataflow of the costed backward operations, in the passes that it is told of.

        >>> recorder = CostRecorder()
        >>> with recorder.forward():
        ...     loss = model(**batch).loss
        >>> with recorder.backward():
        ...     loss.backward()                       # hooks call recorder.operations.mark(name, grad) as gradients arrive
        >>> graph = recorder.operations.graph(candidates)

    Attributes:
        operations: what was recorded.
        rests: whether it lets everything pass, wherever it is among the modes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives modes no types
        self.operations = self._new_operations()
        self.rests = False
        self._origin = f"_made_in_{next(_numbers)}"
        self._formulas = FlopFormulas()
        self._passes: list[_Pass] = []  # that are running, one inside the other
        self._is_paused = False
        self._stops_early = False
        self._is_whole: dict[type, bool] = {}
        self._running = 0
        self._running_as = 0

    def _new_operations(self) -> Operations:
        return Operations()

    @property
    def is_active(self) -> bool:
        """Whether a pass is running."""
        return bool(self._passes)

    @property
    def runs_forward(self) -> bool:
        """Whether the innermost pass that is running is a forward pass."""
        return bool(self._passes) and self._passes[-1].is_forward

    @contextmanager
    def forward(self, origin: int = 0) -> Iterator[None]:
        """For a forward pass: also notices what makes backward operations depend on more than the trained tensors.

        Args:
            origin: a bit that stands for this pass, noted on what comes from it; 0: nothing is noted.
        """
        with self._running_pass(_Pass(is_forward=True, origin=origin)), ExitStack() as modes:
            for mode in self._modes_of_forward():
                modes.enter_context(at_bottom(mode))
            yield

    @contextmanager
    def backward(self, creates_graph: bool = False, is_always_run: bool = False) -> Iterator[None]:
        """For a backward pass, also inside of another pass.

        Args:
            creates_graph: whether it can be differentiated again, so that its operations run with gradients on.
            is_always_run: whether it costs the same whatever is trained, so that it is part of what every step costs.
        """
        with self._running_pass(_Pass(creates_graph=creates_graph, is_always_run=is_always_run)):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For operations that measure something, and are no part of the pass."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def origin(self, tensor: Tensor) -> int:
        """The forward passes that a tensor comes from."""
        origin: int = getattr(tensor, self._origin, 0)
        return origin

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Run an operation, and tell what it costs."""
        out = func(*args, **kwargs)
        return out, self._formulas.flops(func, args, kwargs, out)

    def _modes_of_forward(self) -> list[TorchFunctionMode]:
        return [
            NoticeTrainedBias(self.operations, lambda: self.runs_forward),
            NoticeForcedGradient(self.operations),
        ]

    def _among_modes(self) -> AbstractContextManager[Any]:
        return at_bottom(self)  # a pass may begin in a mode of the user's that is left before the pass ends

    @contextmanager
    def _running_pass(self, running: _Pass) -> Iterator[None]:
        mode = nullcontext() if self.is_active else self._among_modes()  # entered twice, it would see all twice
        self._passes.append(running)
        try:
            with mode:
                yield
        finally:
            self._passes.pop()

    @contextmanager
    def _entered_again(self) -> Iterator[None]:
        """For the parts of an operation: while one is dispatched, the mode is off."""
        self.__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused or self.rests:
            return func(*args, **kwargs)
        if self._formulas.counts_parts(func, args):
            # With function modes off, or one of them takes the parts for the whole.
            with torch._C.DisableTorchFunction(), self._entered_again():
                return func.decompose(*args, **kwargs)

        out, cost = self.run(func, args, kwargs)
        running = self._passes[-1] if self._passes else _BETWEEN
        recomputes = torch.is_grad_enabled() and not running.is_forward and is_recomputing()
        if running.is_always_run or self._is_of_forward(running, recomputes):
            origin = self._marked(running.origin, args, kwargs, out)
            if origin or not running.is_between:
                self.operations.forward_cost += cost
            return out
        self._record(func, args, kwargs, out, cost, recomputes)
        return out

    def _record(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, cost: int, recomputes: bool
    ) -> None:
        """Note an operation of a backward pass on what it makes, with those that it comes from."""
        operations = self.operations
        inherited = 0
        for tensor in tensors_in((*args, *kwargs.values()) if kwargs else args):
            inherited |= operations.ancestors(tensor)

        if recomputes:
            # Gradient checkpointing runs a segment of the forward pass again.
            if cost:
                operation = operations.new_operation(cost)
                operations.recomputed_so_far |= operation
                operations.recomputed |= operation
            inherited |= operations.recomputed_so_far
        elif operations.recomputed_so_far and func is torch.ops.aten.detach.default:
            # Non-reentrant checkpointing saves a tensor again, and stops after the last that is asked for: so whoever
            # uses this one needs what was run so far.
            self._stops_early = True
            inherited |= operations.recomputed_so_far
        else:
            self._end_segment()
            if func is torch.ops.aten.convolution_backward.default:
                self._split_convolution_backward(func, cost, inherited, args, kwargs, out)
                return
            if cost or self._whole_function():
                inherited |= self._operation(cost)

        if inherited:
            for tensor in tensors_in((out, *args) if func._schema.is_mutable else (out,)):
                operations.inherit(tensor, inherited)

    def _is_of_forward(self, running: _Pass, recomputes: bool) -> bool:
        if running.is_forward or torch._C._current_graph_task_id() == -1:
            return True
        # What a hook or a custom function runs with gradients on, where autograd itself runs without.
        return torch.is_grad_enabled() and not running.creates_graph and not recomputes

    def _marked(self, origin: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """The forward passes that a result comes from, noted on it; on what is chosen by numbers (tokens) nothing is."""
        for tensor in tensors_in((*args, *kwargs.values()) if kwargs else args):
            origin |= self.origin(tensor)
        if origin:
            for tensor in tensors_in((out,)):
                if tensor.is_floating_point():
                    setattr(tensor, self._origin, origin)
        return origin

    def _operation(self, cost: int) -> int:
        """A new operation, or that of the custom function which is running."""
        function = self._whole_function()
        if not function:
            return self.operations.new_operation(cost)
        if function != self._running:
            self._running, self._running_as = function, self.operations.new_operation(0)
        self.operations.costs[self._running_as.bit_length() - 1] += cost
        return self._running_as

    def _whole_function(self) -> int:
        """The number of the custom autograd function that is running backward and makes all gradients, else 0."""
        node: Any = torch._C._current_autograd_node()
        if not isinstance(node, BackwardCFunction):
            return 0
        cls = node._forward_cls  # type: ignore[attr-defined]  # set on the class that torch makes of each function
        if cls not in self._is_whole:
            backward: Callable[..., Any] = inspect.unwrap(cls.backward)
            self._is_whole[cls] = "needs_input_grad" not in backward.__code__.co_names
        return 1 + node._sequence_nr() if self._is_whole[cls] else 0

    def _end_segment(self) -> None:
        if self.operations.recomputed_so_far and not self._stops_early:
            # Reentrant checkpointing runs the whole segment for whoever needs any of it.
            self.operations.run_as_one(self.operations.recomputed_so_far)
        self.operations.recomputed_so_far = 0
        self._stops_early = False

    def _split_convolution_backward(
        self, func: OpOverload, cost: int, inherited: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        # One operation makes the gradients of input and weight, but runs only for those that are asked for.
        *others, output_mask = args
        shares = []
        for i in range(3):
            asked = [i == j and output_mask[j] for j in range(3)]
            made = [grad if is_asked else None for grad, is_asked in zip(out, asked)]
            shares.append(self._formulas.flops(func, (*others, asked), kwargs, made))
        for i, grad in enumerate(out):
            if output_mask[i]:
                operation = self.operations.new_operation(cost * shares[i] // sum(shares)) if shares[i] else 0
                self.operations.inherit(grad, inherited | operation)


@dataclass(frozen=True)
class _Pass:
    is_forward: bool = False
    creates_graph: bool = False
    is_always_run: bool = False
    is_between: bool = False
    origin: int = 0


_BETWEEN = _Pass(is_between=True)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values, also in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found
