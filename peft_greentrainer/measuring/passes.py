"""Passes of a model in which every parameter gets a gradient, recorded.

    >>> recorder = CostRecorder()
    >>> record(recorder, model, lambda: model(**batch).loss, dict(model.named_parameters()), recorder.operations.mark)
    >>> graph = recorder.operations.graph(candidates)

`record` runs one such pass and leaves the model as it was; `StepWatch` opens those that a loop of the user's runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank import ONLY_MEASURES, LowRankForms, NoticeLowRank
from .outputs import loss_in
from .recorder import CostRecorder


class RecordedPasses:
    """Has all of these parameters require grad in passes, and only there, and tells of their gradients.

        >>> with RecordedPasses(model, parameters, recorder, on_gradient=recorder.operations.mark) as passes:
        ...     with passes.forward():
        ...         loss = model(**batch).loss
        ...     with passes.backward([loss]):
        ...         loss.backward()

    The gradients of parameters that did not require any before are freed as they arrive, after `on_gradient`.

    Args:
        model: the module whose passes these are.
        parameters: what gets a gradient in them, by name.
        recorder: what they are recorded with.
        on_gradient: is called with the name of a parameter, or of a factor that does not exist yet, and its gradient.
        forms: the low-rank forms of the model.

    Attributes:
        own: the ids of the parameters of the model and of those that are measured.
        frozen: the parameters that require grad in passes only.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        recorder: CostRecorder,
        on_gradient: Callable[[str, Tensor], None],
        forms: LowRankForms = LowRankForms(),
    ) -> None:
        self.parameters = parameters
        self.recorder = recorder
        self.own = {*map(id, model.parameters()), *map(id, parameters.values())}
        self.frozen: list[nn.Parameter] = []
        self._on_gradient = on_gradient
        self._forms = forms
        self._opened = ExitStack()

    def __enter__(self) -> RecordedPasses:
        self._opened.callback(self.frozen.clear)
        self.frozen += [p for p in self.parameters.values() if not p.requires_grad]
        with self._all_require_grad():
            for parameter in self.frozen:
                self._opened.callback(parameter.register_post_accumulate_grad_hook(_free_gradient).remove)
            for name, parameter in self.parameters.items():
                self._opened.callback(parameter.register_hook(partial(self._arrived, name)).remove)
        self._opened.enter_context(NoticeLowRank(self.recorder, self._forms, self._on_gradient))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._opened.close()

    @contextmanager
    def forward(self, origin: int = 0) -> Iterator[None]:
        """For a forward pass; `origin` is a bit that stands for it, see `CostRecorder.forward`."""
        require_grad = self._all_require_grad() if torch.is_grad_enabled() else nullcontext()
        with require_grad, self.recorder.forward(origin):
            yield

    @contextmanager
    def backward(
        self, roots: Iterable[Any], creates_graph: bool = False, is_always_run: bool = False
    ) -> Iterator[None]:
        """For a backward pass from these roots; what else they give a gradient is charged to every step.

        Args:
            roots: tensors, or edges of a graph.
            creates_graph, is_always_run: see `CostRecorder.backward`.
        """
        charge_always = self.recorder.operations.charge_always
        with ExitStack() as hooks, self._all_require_grad():
            for leaf in _other_leaves(roots, self.own):
                hooks.callback(leaf.register_hook(charge_always).remove)
            with self.recorder.backward(creates_graph, is_always_run):
                yield

    def _arrived(self, name: str, grad: Tensor | None) -> None:
        if grad is not None:  # a custom function may give none
            self._on_gradient(name, grad)

    @contextmanager
    def _all_require_grad(self) -> Iterator[None]:
        """In passes; an adapter may have been set in between, as trl does for a reference."""
        changed = [parameter for parameter in self.frozen if not parameter.requires_grad]
        try:
            for parameter in changed:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in changed:
                parameter.requires_grad_(False)


def record(
    recorder: CostRecorder,
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    on_gradient: Callable[[str, Tensor], None],
    forms: LowRankForms = LowRankForms(),
) -> None:
    """Record one pass in which all these parameters get a gradient, and leave the model as it was.

    Args:
        recorder: what it is recorded with.
        model: the module whose pass it is.
        loss: runs the forward pass and gives the scalar loss.
        parameters: what gets a gradient, by name. Gradients are freed as they arrive, after `on_gradient`.
        on_gradient, forms: see `RecordedPasses`.
    """
    with _left_as_it_was(model, parameters.values()):
        for parameter in parameters.values():
            parameter.requires_grad_(False)  # so that no gradient is kept
        with RecordedPasses(model, parameters, recorder, on_gradient, forms) as passes:
            with passes.forward():
                scalar = loss()
            with passes.backward([scalar]):
                scalar.backward()


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output, at any depth.

    Raises:
        ValueError: if there is none.
    """
    loss = loss_in(output)
    if loss is None:
        raise ValueError(
            "The batch gives no loss: the model's output has no `.loss`. Put `labels` into the batch, or pass `loss_fn`."
        )
    return loss


def _free_gradient(parameter: Tensor) -> None:
    """A post-accumulate hook for parameters that are measured but not trained."""
    parameter.grad = None


def _other_leaves(roots: Iterable[Any], own: set[int]) -> list[Tensor]:
    """The tensors that a backward pass from these roots gives a gradient, but for those whose ids are given."""
    nodes: list[Any] = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
    leaves: list[Tensor] = []
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable
            if id(leaf) not in own and leaf.requires_grad and not hasattr(leaf, ONLY_MEASURES):
                leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return leaves


@contextmanager
def _left_as_it_was(model: nn.Module, others: Iterable[nn.Parameter]) -> Iterator[None]:
    parameters = [(p, p.requires_grad, p.grad) for p in {*model.parameters(), *others}]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # A recurrent model may keep its state in plain attributes, with the graph of the pass.
    modules = _modules(model)
    attributes = [(own, dict(own)) for module in modules for own in (module._buffers, vars(module))]
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
        for now, before in attributes:
            now.clear()
            now.update(before)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules, as they are rather than as `modules()` shows them."""
    found = {id(model): model}
    left = [model]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                left.append(child)
    return list(found.values())
