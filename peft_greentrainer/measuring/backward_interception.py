"""Records every backward pass while a step is watched, whoever starts it.

>>> open_watches.add(watch)                        # torch.autograd.backward and torch.autograd.grad are ours now ...
>>> open_watches.discard(watch)                    # ... and are torch's again
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


class PassListener(Protocol):
    """Is told of every backward pass."""

    def backward_pass(
        self, roots: list[Any], keeps_graph: bool, creates_graph: bool, inputs: list[Any] | None
    ) -> AbstractContextManager[list[nn.Parameter]]:
        """For `torch.autograd.backward`. Gives the parameters that are to get a gradient too, if it is for some `inputs`."""

    def gradients(self, outputs: list[Any], inputs: list[Any]) -> AbstractContextManager[None]:
        """For `torch.autograd.grad`."""


class OpenWatches(weakref.WeakSet):
    """Records every backward pass while it is not empty.

    Nothing tells when a backward pass begins, but whoever starts one goes through `torch.autograd.backward` or
    `torch.autograd.grad`.
    """

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
        others = []
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
                None if inputs is None else [*asked, *others],
            )

    def _recorded_grad(self, outputs: Any, inputs: Any, *args, **kwargs) -> Any:
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


def other_leaves(roots: Iterable[Any], own: set[int]) -> list[Tensor]:
    """The tensors that a backward pass from these roots gives a gradient, but for those whose ids are given."""
    nodes = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
    leaves, seen = [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable
            if id(leaf) not in own and leaf.requires_grad and not hasattr(leaf, "only_measures"):
                leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return leaves
