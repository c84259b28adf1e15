"""Tells of every backward pass while a step is watched, whoever starts it.

>>> open_watches.add(watch)                        # torch.autograd.backward and torch.autograd.grad are ours now ...
>>> open_watches.discard(watch)                    # ... and are torch's again

What this changes in torch, while a step is watched and in the whole process: the attributes `backward` and `grad` of
`torch.autograd`. The loop is the user's, and no hook of torch's tells when a backward pass begins: a hook on the loss is
called once it runs, when it is too late to have more parameters get a gradient in it. Whoever starts one, `Tensor.backward`
among them, goes through these two functions. tests/measuring/test_probe.py holds that both are torch's again after a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


class PassListener(Protocol):
    """Is told of every backward pass, by contexts that it runs in."""

    def backward_pass(
        self, roots: list[Any], keeps_graph: bool, creates_graph: bool, inputs: list[Any] | None
    ) -> AbstractContextManager[list[nn.Parameter]]:
        """For `torch.autograd.backward`. Gives the parameters that are to get a gradient too, if it is for some `inputs`."""

    def gradients(self, outputs: list[Any], inputs: list[Any]) -> AbstractContextManager[None]:
        """For `torch.autograd.grad`."""


class OpenWatches(weakref.WeakSet[PassListener]):
    """Those that are told of every backward pass. While it is not empty, `torch.autograd` is patched."""

    def add(self, watch: PassListener) -> None:
        if not self:
            self._backward, self._grad = torch.autograd.backward, torch.autograd.grad
            torch.autograd.backward, torch.autograd.grad = self._recorded_backward, self._recorded_grad
        super().add(watch)

    def discard(self, watch: PassListener) -> None:
        super().discard(watch)
        if not self:
            torch.autograd.backward, torch.autograd.grad = self._backward, self._grad

    def _recorded_backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        keeps = create_graph if retain_graph is None else retain_graph
        asked = None if inputs is None else _listed(inputs)
        others: list[nn.Parameter] = []
        with ExitStack() as passes:
            for watch in list(self):
                recorded = watch.backward_pass(_listed(tensors), keeps, create_graph, asked)
                others += passes.enter_context(recorded)
            self._backward(
                tensors,
                grad_tensors,
                retain_graph,
                create_graph,
                grad_variables,
                None if asked is None else [*asked, *others],
            )

    def _recorded_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as passes:
            for watch in list(self):
                passes.enter_context(watch.gradients(_listed(outputs), _listed(inputs)))
            return self._grad(outputs, inputs, *args, **kwargs)


open_watches = OpenWatches()


def _listed(tensors: Any) -> list[Any]:
    """What autograd takes for its roots, or for its inputs: tensors, or edges of a graph."""
    if isinstance(tensors, (Tensor, GradientEdge)):
        return [tensors]
    return list(tensors.values() if isinstance(tensors, Mapping) else tensors)
