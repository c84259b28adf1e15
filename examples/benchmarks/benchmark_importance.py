"""Ways to say which tensors are worth training, for `benchmark.py`: the paper's, its variants, and what others use.

    >>> importance = METRICS["snip"](model, batches, lr=4e-4)           # {tensor name: float}
    >>> selection = select(profile(model, next(batches)), importance, rho=0.5)

Each gives one number for every tensor, of which only proportions matter; `batches` is an iterator. The update that is
judged is Adam's first, `lr * sign(gradient)`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn


Importance = dict[str, float]
Batches = Iterator[dict[str, Tensor]]


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_pass(model: nn.Module, batches: Batches, lr: float, number: int) -> Importance:
    """The paper's, to first order: what the update gains on the batch that it is made from; averaged over batches."""
    of_batches = [
        {name: grad.abs().sum().item() for name, grad in gradients(model, next(batches)).items()}
        for _ in range(number)
    ]
    return {name: fmean(of_batch[name] for of_batch in of_batches) for name in of_batches[0]}


def two_pass(model: nn.Module, batches: Batches, lr: float) -> Importance:
    """The paper's own code: the update of all tensors is made, and multiplied with the gradient after it."""
    batch = next(batches)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = {name: grad.sign() for name, grad in gradients(model, batch).items()}
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).sub_(lr * update)
    after = gradients(model, batch)
    with torch.no_grad():
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    return {name: (updates[name] * grad).sum().item() for name, grad in after.items()}


def cross_batch(model: nn.Module, batches: Batches, lr: float) -> Importance:
    """What the update gains on another batch."""
    first, second = (gradients(model, next(batches)) for _ in range(2))
    return {name: (grad.sign() * second[name]).sum().item() for name, grad in first.items()}


def squared(model: nn.Module, batches: Batches, lr: float) -> Importance:
    return {name: grad.square().sum().item() for name, grad in gradients(model, next(batches)).items()}


def fisher(model: nn.Module, batches: Batches, lr: float) -> Importance:
    """The trace of the empirical Fisher information: squared gradients of single examples."""
    batch = next(batches)
    total = {}
    for row in range(len(batch["input_ids"])):
        grads = gradients(model, {name: value[row : row + 1] for name, value in batch.items()})
        for name, grad in grads.items():
            total[name] = total.get(name, 0.0) + grad.square().sum().item()
    return total


def snip(model: nn.Module, batches: Batches, lr: float) -> Importance:
    """Lee et al., 2019: what setting a weight to zero would change."""
    grads = gradients(model, next(batches))
    return {name: (grad * model.get_parameter(name)).abs().sum().item() for name, grad in grads.items()}


def magnitude(model: nn.Module, batches: Batches, lr: float) -> Importance:
    return {name: p.abs().sum().item() for name, p in model.named_parameters()}


def at_random(model: nn.Module, batches: Batches, lr: float) -> Importance:
    return {name: torch.rand(()).item() for name, _ in model.named_parameters()}


METRICS: dict[str, Callable[..., Importance]] = {
    "one-pass": partial(one_pass, number=1),
    "one-pass-4-batches": partial(one_pass, number=4),
    "one-pass-16-batches": partial(one_pass, number=16),
    "two-pass": two_pass,
    "cross-batch": cross_batch,
    "squared": squared,
    "fisher": fisher,
    "snip": snip,
    "magnitude": magnitude,
    "random": at_random,
}
