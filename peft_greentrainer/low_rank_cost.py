"""What the low-rank form of a linear tensor would cost, and what those that run already cost.

    >>> recorder = CostRecorder(LowRank(rank=8, linear={"q_proj.weight_low_rank": model.q_proj}))
    >>> with recorder.forward():                      # as `profile` and a probe do
    ...     loss = model(**batch).loss

A linear module without factors runs as it is, and the matrix products that its form would add are added to the recorder
as operations that this form alone needs. The factors' products with the activation and with its gradient (2 FLOPs per
multiply-add, T tokens): `A x` and `B (A x)` forward, and backward the gradients of `B`, of `A x`, of `A`, and of `x`. The
last runs only if the gradient of `x` is needed at all, by a tensor nearer the input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """The low-rank forms of a model.

    Attributes:
        rank: of forms that do not exist yet.
        linear: the linear modules that such a form may be added to, by candidate; each calls `F.linear` or the like.
        updates: the modules that run the update of a form which exists; their products are no part of full fine-tuning.
        provisional: whether those updates will be gone in the steps that the cost graph is about.
    """

    rank: int = 0
    linear: Mapping[str, nn.Module] = field(default_factory=dict)
    updates: tuple[nn.Module, ...] = ()
    provisional: bool = False


class Recorder(Protocol):
    """What is asked of a recorder."""

    needed_by: dict[str, int]
    costs: list[int]
    forward_cost: int
    added: int
    added_forward_cost: int

    def new_operation(self, cost: int) -> int: ...

    def ancestors(self, tensor: Tensor) -> int: ...

    def run_only_if(self, operations: int, condition: int) -> None: ...


class NoticeLowRank:
    """While active, tells a recorder of the operations of low-rank forms."""

    def __init__(self, recorder: Recorder, forms: LowRank) -> None:
        self.recorder = recorder
        self.forms = forms
        self._hooks = ExitStack()
        self._running: dict[nn.Module, _Run] = {}
        self._forward: dict[str, int] = defaultdict(int)

    def __enter__(self) -> None:
        for candidate, module in self.forms.linear.items():
            self._watch(module, partial(self._linear_ran, candidate), partial(self._input_grad, candidate))
        for module in self.forms.updates:
            self._watch(module, self._update_ran, self._update_input_grad)

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def _watch(self, module: nn.Module, ran: Callable[..., None], input_grad: Callable[..., None]) -> None:
        def before(module: nn.Module, args: tuple) -> tuple:
            run = self._running[module] = _Run(len(self.recorder.costs), self.recorder.forward_cost)
            first, *others = args
            if first.requires_grad:
                first = first.view_as(first)  # the gradient that comes from this module alone
                first.register_hook(partial(input_grad, run))
            return first, *others

        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            ran(self._running.pop(module), args[0], output)

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _linear_ran(self, candidate: str, run: _Run, input: Tensor, output: Tensor) -> None:
        run.into = 2 * self.forms.rank * input.numel()
        run.out = 2 * self.forms.rank * output.numel()
        # Gradient checkpointing runs the module again, and would run the update again too.
        operation = self.recorder.new_operation(run.into + run.out)
        if candidate in self.recorder.needed_by and torch._C._current_graph_task_id() != -1:
            self.recorder.needed_by[candidate] |= operation
        else:
            self._forward[candidate] |= operation
        if output.requires_grad:
            output.register_hook(partial(self._output_grad, candidate, run))

    def _output_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        run.ancestors = self.recorder.ancestors(grad)
        needed = run.ancestors | self._forward.pop(candidate, 0) | self.recorder.new_operation(run.into + 2 * run.out)
        self.recorder.needed_by[candidate] = self.recorder.needed_by.pop(candidate, 0) | needed

    def _input_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        through_the_tensor = self.recorder.ancestors(grad) & ~run.ancestors
        operation = self.recorder.new_operation(run.into)
        self.recorder.needed_by[candidate] |= operation
        self.recorder.run_only_if(operation, through_the_tensor)

    def _update_ran(self, run: _Run, input: Tensor, output: Tensor) -> None:
        self.recorder.added_forward_cost += self.recorder.forward_cost - run.forward_cost
        self.recorder.added |= (1 << len(self.recorder.costs)) - (1 << run.operations)
        if output.requires_grad:
            output.register_hook(partial(self._update_output_grad, run))

    def _update_output_grad(self, run: _Run, grad: Tensor) -> None:
        run.ancestors = self.recorder.ancestors(grad)

    def _update_input_grad(self, run: _Run, grad: Tensor) -> None:
        self.recorder.added |= self.recorder.ancestors(grad) & ~run.ancestors


@dataclass
class _Run:
    """One run of a module: what was recorded before it, FLOPs of a product with either factor, ancestors of its gradient."""

    operations: int
    forward_cost: int
    into: int = 0
    out: int = 0
    ancestors: int = 0
