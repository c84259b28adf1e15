"""What the low-rank form of a linear tensor would cost, and what those that run already cost.

    >>> forms = LowRankForms(rank=8, linear={"q_proj.weight_low_rank": model.q_proj})
    >>> with NoticeLowRank(recorder, forms, on_gradient=print), recorder.forward():   # as `RecordedPasses` does
    ...     loss = model(**batch).loss

A linear module without factors runs as it is, and the matrix products that its form would add are noted as operations that
this form alone needs (2 FLOPs per multiply-add): `A x` and `B (A x)` forward, and backward the gradients
of `B`, of `A x`, of `A`, and of `x`. The last runs only if the gradient of `x` is needed at all, by a tensor nearer the input.

The gradient that a new `B`, which is zero, would get is `dy (A x)^T`. It takes neither factors in the model nor the gradient
of the whole tensor: where that is no candidate, it is not computed, and its cost in full fine-tuning is worked out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensors.names import factors
from .recorder import CostRecorder


# On a leaf whose gradient no step computes, only a pass that is recorded.
ONLY_MEASURES = "_only_measures"


@dataclass(frozen=True)
class LowRankForms:
    """The low-rank forms of a model.

    Attributes:
        rank: of forms that do not exist yet.
        linear: the linear modules that such a form may be added to, by candidate; each calls `F.linear` or the like.
        updates: the modules that run the update of a form which exists; their products are no part of full fine-tuning.
        provisional: whether those updates will be gone in the steps that the cost graph is about.
        first_factor: for each form that does not exist yet, gives the `A` (rank, in) that it would begin with, scaled; where
            none is given, no gradient of a new `B` is computed.
        frozen: the tensors of linear modules that are no candidates whole and get no gradient, by each module that reads them.
    """

    rank: int = 0
    linear: Mapping[str, nn.Module] = field(default_factory=dict)
    updates: tuple[nn.Module, ...] = ()
    provisional: bool = False
    first_factor: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    frozen: Mapping[nn.Module, str] = field(default_factory=dict)


class NoticeLowRank:
    """Notes the operations of low-rank forms: in forward passes, and where backward passes recompute them.

    Args:
        recorder: what records these passes.
        forms: the low-rank forms.
        on_gradient: is called with the name and the gradient of each `B` that does not exist yet.
    """

    def __init__(
        self, recorder: CostRecorder, forms: LowRankForms, on_gradient: Callable[[str, Tensor], None]
    ) -> None:
        self.recorder = recorder
        self.operations = recorder.operations
        self.forms = forms
        self.on_gradient = on_gradient
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

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not self.recorder.is_active:  # called by keyword; in an evaluation
                return None
            first, *others = args
            run = _Run(len(self.operations.costs), self.operations.forward_cost)
            if module in self._linear and first.is_floating_point():  # an embedding looks up, for no FLOPs
                run.into = 2 * first.numel()
                weight: Any = module.weight
                run.out = run.into // first.shape[-1] * (weight.numel() // first.shape[-1])
            running.append(run)
            runs(run)
            if first.requires_grad and torch.is_grad_enabled():
                first = first.view_as(first)  # the gradient that comes from this module alone
                first.register_hook(partial(input_grad, run))
            return first, *others

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not args or not self.recorder.is_active:
                return output
            if torch.is_grad_enabled() and not output.requires_grad:
                # Nothing before it is trained, so its own gradient has to be asked for.
                zero = output.new_zeros((), requires_grad=True)
                setattr(zero, ONLY_MEASURES, True)
                output = output + zero
            ran(running.pop(), args[0], output)
            return output

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _linear_runs(self, candidate: str, run: _Run) -> None:
        self._also_needed(candidate, self.operations.new_operation(self.forms.rank * (run.into + run.out)))

    def _linear_ran(self, candidate: str, run: _Run, input: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            if candidate in self.forms.first_factor:
                with torch.no_grad(), self.recorder.paused():
                    run.reduced = F.linear(input, self.forms.first_factor[candidate]().to(input))
            output.register_hook(partial(self._output_grad, candidate, run))

    def _output_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        run.ancestors = self.operations.ancestors(grad)
        backward = self.forms.rank * (run.into + 2 * run.out)
        self._needed(candidate, run.ancestors | self.operations.new_operation(backward))
        if run.reduced is not None:
            rows, reduced = (t.reshape(-1, t.shape[-1]) for t in (grad, run.reduced.to(grad.dtype)))
            _, factor_b = factors(candidate)
            with self.recorder.paused():
                self.on_gradient(factor_b, rows.T @ reduced)

    def _also_needed(self, name: str, operations: int) -> None:
        """Note what the gradient of `name` needs of a run, besides what the gradient of its output comes from."""
        # Gradient checkpointing runs the module again, after all that leads to its input.
        operations |= self.operations.recomputed_so_far
        if name in self.operations.needed_by and torch._C._current_graph_task_id() != -1:
            self.operations.needed_by[name] |= operations
        else:
            self._pending[name] |= operations

    def _needed(self, name: str, operations: int) -> None:
        self.operations.need(name, operations | self._pending.pop(name, 0))

    def _input_grad(self, candidate: str, run: _Run, grad: Tensor) -> None:
        through_the_tensor = self.operations.ancestors(grad) & ~run.ancestors
        operation = self.operations.new_operation(self.forms.rank * run.into)
        self.operations.needed_by[candidate] |= operation
        if through_the_tensor:  # else every step computes it, for a penalty on gradients
            self.operations.run_only_if(operation, through_the_tensor)

    def _frozen_runs(self, tensor: str, run: _Run) -> None:
        self._also_needed(tensor, 0)
        self._recomputed_before[tensor] = self.operations.recomputed_so_far

    def _frozen_ran(self, tensor: str, run: _Run, input: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._frozen_grad, tensor, run.into * output.shape[-1]))

    def _frozen_grad(self, tensor: str, cost: int, grad: Tensor) -> None:
        self._needed(tensor, self.operations.ancestors(grad) | self.operations.new_operation(cost))

    def _frozen_input_grad(self, tensor: str, run: _Run, grad: Tensor) -> None:
        # Checkpointing saves the frozen tensor itself, so nothing tells that the gradient waits for what is run before.
        self.operations.inherit(grad, self._recomputed_before[tensor])

    def _update_ran(self, run: _Run, input: Tensor, output: Tensor) -> None:
        self.operations.added_forward_cost += self.operations.forward_cost - run.forward_cost
        self.operations.added |= (1 << len(self.operations.costs)) - (1 << run.operations)
        if output.requires_grad:
            output.register_hook(partial(self._update_output_grad, run))

    def _update_output_grad(self, run: _Run, grad: Tensor) -> None:
        run.ancestors = self.operations.ancestors(grad)

    def _update_input_grad(self, run: _Run, grad: Tensor) -> None:
        self.operations.added |= self.operations.ancestors(grad) & ~run.ancestors & ~self.operations.recomputed


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
