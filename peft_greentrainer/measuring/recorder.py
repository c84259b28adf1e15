"""Records what a backward pass costs, and which of its operations each gradient needs.

The ancestors of a tensor's gradient among the costed operations are exactly what autograd runs when that tensor is
trained. So the dataflow of one pass in which every tensor is trained tells the cost of training any of them.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from .attention_bias import NoticeTrainedBias
from .forced_gradients import NoticeForcedGradient
from .formulas import looks_like_matmul, missing_formulas
from .low_rank import LowRank
from .mode_stack import at_bottom
from .recomputation import is_recomputing


_numbers = itertools.count()
# Most of what is costed. Formulas are slow, and the shapes are the same in every layer.
_PRODUCTS = {id(getattr(torch.ops.aten, name).default) for name in ("mm", "addmm", "bmm", "baddbmm")}


class CostRecorder(TorchDispatchMode):
    """Records what the forward pass costs and the dataflow of the costed backward operations while it is active.

        >>> with CostRecorder() as recorder:
        ...     loss = model(**batch).loss
        ...     loss.backward()                       # hooks call recorder.mark(name, grad) as gradients arrive
        >>> graph = graph_of(recorder, candidates)

    What the updates of low-rank forms cost, forward and backward, is noted as added: full fine-tuning has none. It keeps no tensor alive: every tensor made in the backward pass carries the set of its costed ancestors, an int
    used as a bit set, as an attribute, whose name is this recorder's own.
    """

    unit: Literal["flops", "seconds"] = "flops"

    def __init__(self, forms: LowRank = LowRank(), on_gradient: Callable[[str, Tensor], None] | None = None) -> None:
        super().__init__()
        self.forms = forms
        self.on_gradient = on_gradient  # is told the gradients of factors that do not exist yet
        self.forward_cost = 0
        self.added_forward_cost = 0
        self.added = 0
        number = next(_numbers)
        self._attribute = f"_costed_ancestors_{number}"
        self._origin = f"_made_in_{number}"
        self.costs = [0]  # bit 0 of a set of ancestors stands for no operation
        self.needed_by: dict[str, int] = {}
        self.forced = 0
        self.conditions: dict[int, tuple[int, bool]] = {}
        self._is_whole: dict[type, bool] = {}
        self._running = 0
        self._running_as = 0
        self.recomputed_so_far = 0  # of the segment that gradient checkpointing runs again
        self.recomputed = 0  # of all of them
        self._stops_early = False
        self._is_aside = False
        self._active = 0
        self._passes: list[_Pass] = []  # that are running, one inside the other
        self.rests = False  # whether it lets everything pass
        self._formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in missing_formulas().items()}}
        self._flops_of: dict[tuple, int] = {}
        self._formula_of: dict[int, Callable[..., int] | None] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, as JSON: sets of operations in hexadecimal."""
        return {
            "forward_cost": self.forward_cost,
            "added_forward_cost": self.added_forward_cost,
            "added": hex(self.added),
            "costs": self.costs,
            "needed_by": {name: hex(bits) for name, bits in self.needed_by.items()},
            "forced": hex(self.forced),
            "conditions": [[operation, *condition] for operation, condition in self.conditions.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was recorded."""
        self.forward_cost = state["forward_cost"]
        self.added_forward_cost = state["added_forward_cost"]
        self.added = int(state["added"], 16)
        self.costs = list(state["costs"])
        self.needed_by = {name: int(bits, 16) for name, bits in state["needed_by"].items()}
        self.forced = int(state["forced"], 16)
        self.conditions = {operation: (on, wanted) for operation, on, wanted in state["conditions"]}

    def __enter__(self) -> CostRecorder:
        self._active += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._active -= 1
        super().__exit__(*exception)

    @contextmanager
    def _entered_again(self) -> Iterator[None]:
        """For the parts of an operation: while one is dispatched, the mode is off."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @property
    def is_active(self) -> bool:
        return self._active > 0

    @property
    def runs_forward(self) -> bool:
        """Whether the innermost pass that is running is a forward pass."""
        return bool(self._passes) and self._passes[-1].is_forward

    @contextmanager
    def forward(self, origin: int = 0) -> Iterator[None]:
        """For the forward pass: also notices what makes backward operations depend on more than the trained tensors.

        Args:
            origin: a bit that stands for this pass, noted on what comes from it; 0: nothing is noted.
        """
        running = _Pass(is_forward=True, origin=origin)
        with self._running_pass(running), at_bottom(NoticeTrainedBias(self)), at_bottom(NoticeForcedGradient(self)):
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
    def _running_pass(self, running: _Pass) -> Iterator[None]:
        # It may begin in a mode of the user's that is left before it ends; and entered twice, it would see all twice.
        mode = nullcontext() if self.is_active else at_bottom(self)
        self._passes.append(running)
        self._active += 1
        try:
            with mode:
                yield
        finally:
            self._active -= 1
            self._passes.pop()

    def mark(self, name: str, grad: Tensor) -> None:
        """Note that `grad` is the gradient of the tensor `name`. Call it as gradients arrive."""
        self.needed_by[name] = self.needed_by.pop(name, 0) | self.ancestors(grad)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For operations that measure something, and are no part of the pass."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._is_aside or self.rests:
            return func(*args, **kwargs)
        if id(func) not in self._formula_of:  # hashing an operator is slow
            self._formula_of[id(func)] = self._find_formula(func, args)
        if self._formula_of[id(func)] is _decompose:
            with (
                torch._C.DisableTorchFunction(),
                self._entered_again(),
            ):  # or a function mode takes the parts for the whole
                return func.decompose(*args, **kwargs)

        out, cost = self.run(func, args, kwargs)
        running = self._passes[-1] if self._passes else _BACKWARD if self.is_active else _BETWEEN
        recomputes = torch.is_grad_enabled() and not running.is_forward and is_recomputing()
        if running.is_always_run or self._is_of_forward(running, recomputes):
            origin = self._marked(running.origin, args, kwargs, out)
            if origin or not running.is_between:
                self.forward_cost += cost
            return out

        inherited = 0
        for tensor in tensors_in((*args, *kwargs.values()) if kwargs else args):
            inherited |= self.ancestors(tensor)

        if recomputes:
            # Gradient checkpointing runs a segment of the forward pass again.
            if cost:
                operation = self.new_operation(cost)
                self.recomputed_so_far |= operation
                self.recomputed |= operation
            inherited |= self.recomputed_so_far
        elif self.recomputed_so_far and func is torch.ops.aten.detach.default:
            # Non-reentrant checkpointing saves a tensor again, and stops after the last that is asked for: so whoever
            # uses this one needs what was run so far.
            self._stops_early = True
            inherited |= self.recomputed_so_far
        else:
            self._end_segment()
            if func is torch.ops.aten.convolution_backward.default:
                self._split_convolution_backward(cost, inherited, args, kwargs, out)
                return out
            if cost or self._whole_function():
                inherited |= self._operation(cost)

        if inherited:
            for tensor in tensors_in((out, *args) if func._schema.is_mutable else (out,)):
                self.inherit(tensor, inherited)
        return out

    def _is_of_forward(self, running: _Pass, recomputes: bool) -> bool:
        if running.is_forward or torch._C._current_graph_task_id() == -1:
            return True
        # What a hook or a custom function runs with gradients on, where autograd itself runs without.
        return torch.is_grad_enabled() and not running.creates_graph and not recomputes

    def _marked(self, origin: int, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
        """The forward passes that a result comes from, noted on it; on what is chosen by numbers (tokens) nothing is."""
        for tensor in tensors_in((*args, *kwargs.values()) if kwargs else args):
            origin |= self.origin(tensor)
        if origin:
            for tensor in tensors_in((out,)):
                if tensor.is_floating_point():
                    setattr(tensor, self._origin, origin)
        return origin

    def origin(self, tensor: Tensor) -> int:
        """The forward passes that a tensor comes from."""
        return getattr(tensor, self._origin, 0)

    def run(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Run an operation, and tell what it costs."""
        out = func(*args, **kwargs)
        formula = self._formula_of[id(func)]
        if formula is None:
            return out, 0
        if id(func) not in _PRODUCTS:
            return out, formula(*args, **kwargs, out_val=out)
        shapes = (id(func), args[-2].shape, args[-1].shape)
        if shapes not in self._flops_of:
            self._flops_of[shapes] = formula(*args, **kwargs, out_val=out)
        return out, self._flops_of[shapes]

    def _operation(self, cost: int) -> int:
        """A new operation, or that of the custom function which is running."""
        function = self._whole_function()
        if not function:
            return self.new_operation(cost)
        if function != self._running:
            self._running, self._running_as = function, self.new_operation(0)
        self.costs[self._running_as.bit_length() - 1] += cost
        return self._running_as

    def _whole_function(self) -> int:
        """The number of the custom autograd function that is running backward and makes all gradients, else 0."""
        node = torch._C._current_autograd_node()
        if not isinstance(node, BackwardCFunction):
            return 0
        cls = node._forward_cls
        if cls not in self._is_whole:
            backward = inspect.unwrap(cls.backward)
            self._is_whole[cls] = "needs_input_grad" not in backward.__code__.co_names
        return 1 + node._sequence_nr() if self._is_whole[cls] else 0

    def new_operation(self, cost: int) -> int:
        self.costs.append(cost)
        return 1 << (len(self.costs) - 1)

    def ancestors(self, tensor: Tensor) -> int:
        """The costed operations that this tensor comes from."""
        ancestors = getattr(tensor, self._attribute, 0)
        base = tensor._base
        return ancestors if base is None else ancestors | getattr(base, self._attribute, 0)

    def inherit(self, tensor: Tensor, ancestors: int) -> None:
        """Add operations to those that this tensor, and the one that it is a view of, come from."""
        setattr(tensor, self._attribute, self.ancestors(tensor) | ancestors)
        if tensor._base is not None:
            setattr(tensor._base, self._attribute, self.ancestors(tensor._base) | ancestors)

    def force(self, grad: Tensor) -> None:
        """Note that every step computes `grad`, whatever is trained."""
        self.forced |= self.ancestors(grad)

    def charge_always(self, grad: Tensor) -> None:
        """Note that every step computes `grad`, whatever is trained, since it is that of something else that is trained."""
        for operation in bits_of(self.ancestors(grad)):
            if operation in self.conditions or self.forced >> operation & 1:
                self.forced |= 1 << operation
                continue
            self.forward_cost += self.costs[operation]
            if self.added >> operation & 1:
                self.added_forward_cost += self.costs[operation]
            self.costs[operation] = 0

    def run_only_if(self, operations: int, condition: int) -> None:
        """These operations run only in steps in which some trained tensor needs the operation `condition`."""
        for operation in bits_of(operations & ~condition):
            self.conditions[operation] = (condition.bit_length() - 1, True)

    def run_only_unless(self, operations: int, condition: int) -> None:
        """These operations run only in steps in which no trained tensor needs the operation `condition`."""
        for operation in bits_of(operations):
            self.conditions[operation] = (condition.bit_length() - 1, False)

    def _end_segment(self) -> None:
        if self.recomputed_so_far and not self._stops_early:
            # Reentrant checkpointing runs the whole segment for whoever needs any of it.
            first, *others = bits_of(self.recomputed_so_far)
            for operation in others:
                self.costs[first] += self.costs[operation]
                self.costs[operation] = 0
        self.recomputed_so_far = 0
        self._stops_early = False

    def _split_convolution_backward(self, cost: int, inherited: int, args, kwargs, out) -> None:
        # One operation makes the gradients of input and weight, but runs only for those that are asked for.
        *_, output_mask = args
        formula = self._formulas[torch.ops.aten.convolution_backward]
        shares = []
        for i in range(3):
            asked = [i == j and output_mask[j] for j in range(3)]
            shares.append(formula(*args[:-1], asked, **kwargs, out_val=[g if m else None for g, m in zip(out, asked)]))
        for i, grad in enumerate(out):
            if output_mask[i]:
                operation = self.new_operation(cost * shares[i] // sum(shares)) if shares[i] else 0
                self.inherit(grad, inherited | operation)

    def _find_formula(self, func, args):
        packet = getattr(func, "_overloadpacket", func)
        if packet in self._formulas:
            return self._formulas[packet]
        if isinstance(func, torch._ops.OpOverload):
            if func._can_decompose():
                return _decompose
            if looks_like_matmul(func, args):
                warnings.warn(
                    f"{func._schema.name} looks like a matrix product but has no FLOP formula, so it counts as free. Add "
                    "one with torch.utils.flop_counter.register_flop_formula.",
                    stacklevel=2,
                )
        return None


@dataclass(frozen=True)
class _Pass:
    is_forward: bool = False
    creates_graph: bool = False
    is_always_run: bool = False
    is_between: bool = False
    origin: int = 0


_BACKWARD, _BETWEEN = _Pass(), _Pass(is_between=True)


def _decompose(*args, **kwargs) -> int:
    raise AssertionError("marks operations that are recorded as their parts")


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values, also in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def bits_of(operations: int) -> Iterator[int]:
    """The numbers of the operations in a set."""
    return (i for i, bit in enumerate(reversed(f"{operations:b}")) if bit == "1")
