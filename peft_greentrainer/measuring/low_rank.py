"""What the low-rank form of a linear tensor would cost, and what those that run already cost.

    >>> recorder = CostRecorder(LowRank(rank=8, linear={"q_proj.weight_low_rank": model.q_proj}))
    >>> with recorder.forward():                      # as `profile` and a probe do
    ...     loss = model(**batch).loss

A linear module without factors runs as it is, and the matrix products that its form would add are added to the recorder
as operations that this form alone needs (2 FLOPs per multiply-add): `A x` and `B (A x)` forward, and backward the gradients
of `B`, of `A x`, of `A`, and of `x`. The last runs only if the gradient of `x` is needed at all, by a tensor nearer the input.

The gradient that a new `B`, which is zero, would get is `dy (A x)^T`. It takes neither factors in the model nor the gradient
of the whole tensor: where that is no candidate, it is not computed, and its cost in full fine-tuning is worked out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensors.names import factors


@dataclass(frozen=True)
class LowRank:
    """The low-rank forms of a model.

    Attributes:
        rank: of forms that do not exist yet.
        linear: the linear modules that such a form may be added to, by candidate; each calls `F.linear` or the like.
        updates: the modules that run the update of a form which exists; their products are no part of full fine-tuning.
        provisional: whether those updates will be gone in the steps that the cost graph is about.
        first_factor: for each form that does not exist yet, gives the `A` (rank, in) that it would begin with, scaled.
        frozen: the tensors of linear modules that are no candidates whole and get no gradient, by each module that reads them.
    """

    rank: int = 0
    linear: Mapping[str, nn.Module] = field(default_factory=dict)
    updates: tuple[nn.Module, ...] = ()
    provisional: bool = False
    first_factor: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    frozen: Mapping[nn.Module, str] = field(default_factory=dict)


class Recorder(Protocol):
    """What is asked of a recorder."""

    needed_by: dict[str, int]
    costs: list[int]
    forward_cost: int
    added: int
    added_forward_cost: int
    recomputed: int
    recomputed_so_far: int
    forms: LowRank
    is_active: bool
    on_gradient: Callable[[str, Tensor], None] | None

    def new_operation(self, cost: int) -> int: ...

    def ancestors(self, tensor: Tensor) -> int: ...

    def inherit(self, tensor: Tensor, ancestors: int) -> None: ...

    def aside(self) -> AbstractContextManager[None]: ...

    def run_only_if(self, operations: int, condition: int) -> None: ...


class NoticeLowRank:
    """Tells a recorder of the operations of low-rank forms: in forward passes, and where backward passes recompute them."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.forms = recorder.forms
        self._hooks = ExitStack()
        self._linear = {*self.forms.linear.values(), *self.forms.frozen}
        self._pending: dict[str, int] = defaultdict(int)
        self._recomputed_before: dict[str, int] = {}

    def __enter__(self) -> None:
        for candidate, module in self.forms.linear.items():
            self._watch(
                module,
                partial(self._linear_runs, candidate),
                partial(self._linear_ran, candidate),
                partial(self._input_grad, candidate),
            )
        for module, tensor in self.forms.frozen.items():
            self._watch(
                module,
                partial(self._frozen_runs, tensor),
                partial(self._frozen_ran, tensor),
                partial(self._frozen_input_grad, tensor),
            )
        for module in self.forms.updates:
            self._watch(module, lambda run: None, self._update_ran, self._update_input_grad)

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def _watch(
        self,
        module: nn.Module,
        runs: Callable[[_Run], None],
        ran: Callable[[_Run, Tensor, Tensor], None],
        input_grad: Callable[[_Run, Tensor], None],
    ) -> None:
        running = []

        def before(module: nn.Module, args: tuple) -> tuple | None:
            if not args or not self.recorder.is_active:  # called by keyword; in an evaluation
                return None
            first, *others = args
            run = _Run(len(self.recorder.costs), self.recorder.forward_cost)
            if module in self._linear and first.is_floating_point():  # an embedding looks up, for no FLOPs
                run.into = 2 * first.numel()
                run.out = run.into // first.shape[-1] * (module.weight.numel() // first.shape[-1])
            running.append(run)
            runs(run)
            if first.requires_grad and torch.is_grad_enabled():
                first = first.view_as(first)  # the gradient that comes from this module alone
                first.register_hook(partial(input_grad, run))
            return first, *others

        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not args or not self.recorder.is_active:
                return output
            if torch.is_grad_enabled() and not output.requires_grad:
                # Nothing before it is trained, so its own gradient has to be asked for.
                zero = output.new_zeros((), requires_grad=True)
                zero.only_measures = True  # no other leaf whose gradient a step computes
                output = output + zero
            ran(running.pop(), args[0], output)
            return output

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _linear_runs(self, candidate: str, run: _Run) -> None:
        self._also_needed(candidate, self.recorder.new_operation(self.forms.rank * (run.into + run.out)))

    def _linear_ran(self, candidate: str, run: _Run, input: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            if self.recorder.on_gradient is not None:
                with torch.no_grad(), self.recorder.aside():
                    run.reduced = F.linear(input, self.forms.first_factor[candidate]().to(input))
            output.register_hook(partial(self._output_grad, candidate, run))

    def _output_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        recorder = self.recorder
        run.ancestors = recorder.ancestors(grad)
        backward = self.forms.rank * (run.into + 2 * run.out)
        self._needed(candidate, run.ancestors | recorder.new_operation(backward))
        if run.reduced is not None:
            rows, reduced = (t.reshape(-1, t.shape[-1]) for t in (grad, run.reduced.to(grad.dtype)))
            _, factor_b = factors(candidate)
            with recorder.aside():
                recorder.on_gradient(factor_b, rows.T @ reduced)

    def _also_needed(self, name: str, operations: int) -> None:
        """Note what the gradient of `name` needs of a run, besides what the gradient of its output comes from."""
        # Gradient checkpointing runs the module again, after all that leads to its input.
        operations |= self.recorder.recomputed_so_far
        if name in self.recorder.needed_by and torch._C._current_graph_task_id() != -1:
            self.recorder.needed_by[name] |= operations
        else:
            self._pending[name] |= operations

    def _needed(self, name: str, operations: int) -> None:
        operations |= self._pending.pop(name, 0)
        self.recorder.needed_by[name] = self.recorder.needed_by.pop(name, 0) | operations

    def _input_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        through_the_tensor = self.recorder.ancestors(grad) & ~run.ancestors
        operation = self.recorder.new_operation(self.forms.rank * run.into)
        self.recorder.needed_by[candidate] |= operation
        self.recorder.run_only_if(operation, through_the_tensor)

    def _frozen_runs(self, tensor: str, run: _Run) -> None:
        self._also_needed(tensor, 0)
        self._recomputed_before[tensor] = self.recorder.recomputed_so_far

    def _frozen_ran(self, tensor: str, run: _Run, input: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._frozen_grad, tensor, run.into * output.shape[-1]))

    def _frozen_grad(self, tensor: str, cost: int, grad: Tensor) -> None:
        self._needed(tensor, self.recorder.ancestors(grad) | self.recorder.new_operation(cost))

    def _frozen_input_grad(self, tensor: str, run: _Run, grad: Tensor) -> None:
        # Checkpointing saves the frozen tensor itself, so nothing tells that the gradient waits for what is run before.
        self.recorder.inherit(grad, self._recomputed_before[tensor])

    def _update_ran(self, run: _Run, input: Tensor, output: Tensor) -> None:
        self.recorder.added_forward_cost += self.recorder.forward_cost - run.forward_cost
        self.recorder.added |= (1 << len(self.recorder.costs)) - (1 << run.operations)
        if output.requires_grad:
            output.register_hook(partial(self._update_output_grad, run))

    def _update_output_grad(self, run: _Run, grad: Tensor) -> None:
        run.ancestors = self.recorder.ancestors(grad)

    def _update_input_grad(self, run: _Run, grad: Tensor) -> None:
        self.recorder.added |= self.recorder.ancestors(grad) & ~run.ancestors & ~self.recorder.recomputed


@dataclass
class _Run:
    """One run of a module: what was recorded before it, FLOPs of a product with a factor of rank one, its input times the
    first factor, and the ancestors of the gradient of its output."""

    operations: int
    forward_cost: int
    into: int = 0
    out: int = 0
    reduced: Tensor | None = None
    ancestors: int = 0
