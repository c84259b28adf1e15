"""What does training a set of tensors cost? Exact FLOPs of a training step, for any architecture.

    >>> graph = profile(model, batch)                 # one forward and backward pass, recorded
    >>> graph.tensors[:2]                             # in execution order
    ('model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight')
    >>> graph.ratio(graph.tensors[-9:])               # train the last block only
    0.41
    >>> graph.flops(graph.tensors) == graph.full_flops
    True

The ancestors of a tensor's gradient among the operations of a backward pass are what autograd runs when that tensor
is trained, and the cost of a set is the cost of the union. Residual branches, tied embeddings, cross-attention and
experts need no rules of their own (design: the cost graph; the paper, section 3.1, has a table of formulas instead).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from .formulas import looks_like_matmul, missing_formulas


@dataclass(frozen=True, eq=False)
class CostGraph:
    """The FLOPs of one training step, as a function of the set of trained tensors.

        >>> graph.flops([])                           # nothing trained: the forward pass
        120000
        >>> graph.flops(["a.weight", "b.bias"])       # forward + what these two gradients need
        250000

    Attributes:
        tensors: the names of the candidate tensors, in execution order.
        forward_flops: FLOPs of the forward pass.
        full_flops: FLOPs of full fine-tuning, forward included: every parameter that gets a gradient, candidate or not.
        costs: (C,) int64, FLOPs of each class of backward operations (those needed by the same tensors).
        needs: (N, C) bool, which classes the gradient of each tensor needs.
    """

    tensors: tuple[str, ...]
    forward_flops: int
    full_flops: int
    costs: np.ndarray = field(repr=False)
    needs: np.ndarray = field(repr=False)

    def flops(self, tensors: Iterable[str]) -> int:
        """FLOPs of one training step in which just these tensors are trained, forward included.

        Raises `ValueError` for a name that is not a candidate.
        """
        rows = self.needs[self.rows(tensors)]
        return self.forward_flops + int(self.costs @ rows.any(axis=0))

    def ratio(self, tensors: Iterable[str]) -> float:
        """`flops(tensors) / full_flops`: the share of full fine-tuning that a step with these tensors costs."""
        return self.flops(tensors) / self.full_flops

    @cached_property
    def floor(self) -> float:
        """The smallest ratio that any non-empty selection reaches."""
        return float(self.forward_flops + (self.needs @ self.costs).min()) / self.full_flops

    def rows(self, tensors: Iterable[str]) -> list[int]:
        """The rows of `needs` that belong to these tensors."""
        tensors = list(tensors)
        unknown = [name for name in tensors if name not in self._row]
        if unknown:
            raise ValueError(
                f"Not candidates of this cost graph: {unknown[:3]}{' ...' if len(unknown) > 3 else ''}. "
                "Use names from `graph.tensors`; a tensor whose gradient the profiled step did not compute has no cost."
            )
        return [self._row[name] for name in tensors]

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.tensors)}


class CostRecorder(TorchDispatchMode):
    """Records the forward FLOPs and the dataflow of the costed backward operations while it is active.

        >>> with CostRecorder() as recorder:
        ...     loss = model(**batch).loss
        ...     loss.backward()                       # hooks call recorder.mark(name, grad) as gradients arrive
        >>> graph = recorder.graph(candidates)

    It keeps no tensor alive: every tensor made in the backward pass carries the set of its costed ancestors, an int
    used as a bit set, as an attribute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops = 0
        self._costs = [0]  # bit 0 of a set of ancestors stands for no operation
        self._needed_by: dict[str, int] = {}
        self._recomputed_segment = 0
        self._formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in missing_formulas().items()}}
        self._formula_of: dict[Any, Callable[..., int] | None] = {}

    def mark(self, name: str, grad: Tensor) -> None:
        """Note that `grad` is the gradient of the tensor `name`. Call it as gradients arrive."""
        self._needed_by[name] = self._needed_by.pop(name, 0) | _ancestors(grad)

    def graph(self, candidates: Iterable[str]) -> CostGraph:
        """The cost graph of what was recorded, with those `candidates` that got a gradient.

        Raises `ValueError` where none of them did.
        """
        candidates = set(candidates)
        names = list(reversed(self._needed_by))  # gradients arrive in the reverse of execution order
        if not candidates.intersection(names):
            raise ValueError("The loss reaches no candidate tensor: check that it depends on the model's parameters.")
        width = (len(self._costs) + 7) // 8
        packed = np.array(
            [np.frombuffer(self._needed_by[name].to_bytes(width, "little"), dtype=np.uint8) for name in names]
        ).reshape(len(names), width)
        needs = np.unpackbits(packed, axis=1, count=len(self._costs), bitorder="little").astype(bool)
        costs = np.array(self._costs, dtype=np.int64)

        # Operations that the same tensors need are one class, those that no tensor needs are none.
        patterns, class_of_op = np.unique(np.packbits(needs, axis=0), axis=1, return_inverse=True)
        class_costs = np.zeros(patterns.shape[1], dtype=np.int64)
        np.add.at(class_costs, class_of_op.reshape(-1), costs)
        needs = np.unpackbits(patterns, axis=0, count=len(names)).astype(bool)

        rows = [i for i, name in enumerate(names) if name in candidates]
        return CostGraph(
            tensors=tuple(names[i] for i in rows),
            forward_flops=self.forward_flops,
            full_flops=self.forward_flops + int(class_costs @ needs.any(axis=0)),
            costs=class_costs,
            needs=needs[rows],
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self._formula_of:
            self._formula_of[func] = self._find_formula(func, args)
        formula = self._formula_of[func]
        if formula is _decompose:
            with self:
                return func.decompose(*args, **kwargs)

        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            if formula is not None:
                self.forward_flops += formula(*args, **kwargs, out_val=out)
            return out

        inherited = 0
        for tensor in _tensors(args):
            inherited |= _ancestors(tensor)
        if kwargs:
            for tensor in _tensors(kwargs.values()):
                inherited |= _ancestors(tensor)

        if torch.is_grad_enabled():
            # Gradient checkpointing runs a segment of the forward pass again, as a whole, for the first gradient that
            # needs any of it: one bit for the segment.
            if not self._recomputed_segment:
                self._recomputed_segment = self._new_operation(0)
            inherited |= self._recomputed_segment
            if formula is not None:
                self._costs[self._recomputed_segment.bit_length() - 1] += formula(*args, **kwargs, out_val=out)
        else:
            self._recomputed_segment = 0
            if func is torch.ops.aten.convolution_backward.default:
                self._split_convolution_backward(formula, inherited, args, kwargs, out)
                return out
            if formula is not None:
                inherited |= self._new_operation(formula(*args, **kwargs, out_val=out))

        if inherited:
            written = args if func._schema.is_mutable else ()
            for tensor in _tensors((out, *written)):
                _inherit(tensor, inherited)
        return out

    def _new_operation(self, flops: int) -> int:
        self._costs.append(flops)
        return 1 << (len(self._costs) - 1)

    def _split_convolution_backward(self, formula, inherited: int, args, kwargs, out) -> None:
        # One operation makes the gradients of input and weight, but runs only for those that are asked for.
        *_, output_mask = args
        for i, grad in enumerate(out):
            if output_mask[i]:
                only_this = [i == j for j in range(3)]
                flops = formula(
                    *args[:-1], only_this, **kwargs, out_val=[g if m else None for g, m in zip(out, only_this)]
                )
                _inherit(grad, inherited | (self._new_operation(flops) if flops else 0))

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


def _decompose(*args, **kwargs) -> int:
    raise AssertionError("marks operations that are recorded as their parts")


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _ancestors(tensor: Tensor) -> int:
    ancestors = getattr(tensor, "_costed_ancestors", 0)
    base = tensor._base
    return ancestors if base is None else ancestors | getattr(base, "_costed_ancestors", 0)


def _inherit(tensor: Tensor, ancestors: int) -> None:
    tensor._costed_ancestors = _ancestors(tensor) | ancestors
    if tensor._base is not None:
        tensor._base._costed_ancestors = _ancestors(tensor._base) | ancestors


def profile(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple | Tensor,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    candidates: Iterable[str] | None = None,
) -> CostGraph:
    """Record one forward and backward pass of `model` on `batch` and return its cost graph.

        >>> graph = profile(model, {"input_ids": ids, "labels": ids})        # ids: (batch, tokens)
        >>> graph = profile(net, images, loss_fn=lambda output, batch: F.cross_entropy(output, labels))

    Args:
        model: any module. On the `meta` device nothing is computed. It is left as it was: parameters, gradients,
            `requires_grad`, buffers and the random state.
        batch: keyword arguments of the model as a mapping, positional ones as a tuple, or a single tensor.
        loss_fn: `loss_fn(output, batch)` gives the scalar loss, where the model's output has no `.loss`.
        candidates: names of parameters that may be selected; default: every floating-point parameter. The others
            still count in `full_flops`.

    Raises:
        ValueError: if the batch gives no loss.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}

    def loss() -> Tensor:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple) else model(batch)
        return loss_fn(output, batch) if loss_fn is not None else loss_of(output)

    recorder = CostRecorder()
    record(recorder, model, loss, parameters, recorder.mark)
    return recorder.graph(parameters if candidates is None else candidates)


def record(
    recorder: CostRecorder,
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    on_gradient: Callable[[str, Tensor], None],
) -> None:
    """Record one pass in which all these parameters get a gradient, and leave the model as it was.

    Gradients are freed as they arrive, after `on_gradient(name, grad)`.
    """
    with _left_as_it_was(model), recorder, ExitStack() as hooks:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            hooks.callback(parameter.register_hook(partial(on_gradient, name)).remove)
            hooks.callback(parameter.register_post_accumulate_grad_hook(free_gradient).remove)
        loss().backward()


def loss_of(output: Any) -> Tensor:
    """The `.loss` of a model's output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            "The batch gives no loss: the model's output has no `.loss`. Put `labels` into the batch, or pass `loss_fn`."
        )
    return loss


def free_gradient(parameter: nn.Parameter) -> None:
    """A post-accumulate hook for parameters that are measured but not trained."""
    parameter.grad = None


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gpus = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
