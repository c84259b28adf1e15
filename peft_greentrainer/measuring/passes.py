"""One forward and backward pass in which every tensor gets a gradient, recorded, and the model left as it was.

>>> recorder = CostRecorder()
>>> record(recorder, model, lambda: model(**batch).loss, dict(model.named_parameters()), recorder.mark)
>>> graph = graph_of(recorder, candidates)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backward_interception import other_leaves
from .low_rank import NoticeLowRank
from .outputs import loss_in
from .recorder import CostRecorder


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

    def arrived(name: str, grad: Tensor | None) -> None:
        if grad is not None:  # a custom function may give none
            on_gradient(name, grad)

    with _left_as_it_was(model), NoticeLowRank(recorder), ExitStack() as hooks:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            hooks.callback(parameter.register_hook(partial(arrived, name)).remove)
            hooks.callback(parameter.register_post_accumulate_grad_hook(free_gradient).remove)
        with recorder.forward():
            scalar = loss()
        for leaf in other_leaves([scalar], {*map(id, model.parameters()), *map(id, parameters.values())}):
            hooks.callback(leaf.register_hook(recorder.charge_always).remove)
        with recorder:
            scalar.backward()


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output, at any depth."""
    loss = loss_in(output)
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
