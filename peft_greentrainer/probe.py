"""A probe: measures cost and importance inside an ordinary training step.

    >>> probe = Probe(model, parameters, measure=lambda name, grad: importance(grad, "adam", lr=1e-4))
    >>> probe.arm()
    >>> model(**batch).loss.backward()                # the next step, as the user's loop runs it
    >>> probe.complete
    True
    >>> graph, importances = probe.read(parameters)   # and the model is as it was before

In that step every tensor requires grad. The gradients of tensors that are not being trained are freed as they arrive,
so accumulated gradients, clipping and the optimizer see those of the trained ones, as always. With `batch_size` the
measurement is a pass of its own on the first rows of the batch, before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from .cost import CostGraph, free_gradient, loss_of, record
from .recorder import CostRecorder


class Probe:
    """Measures the next `batches` forward and backward passes of a model.

    Args:
        model: the module whose forward runs the step.
        parameters: what to measure, by name: for each tensor, the parameter that forward uses.
        measure: `measure(name, grad)` gives the importance of one gradient, a scalar tensor; it is averaged over passes.
        batches: number of forward and backward passes.
        batch_size: measure on so many rows, in a pass of its own; None: on the whole batch, in the step itself.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        measure: Callable[[str, Tensor], Tensor],
        batches: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.measure = measure
        self.batches = batches
        self.batch_size = batch_size
        self.passes = 0
        self._recorder = CostRecorder()
        self._sums: dict[str, Tensor] = {}
        self._armed = ExitStack()
        self._opened = ExitStack()
        self._recording = ExitStack()
        self._is_open = False
        self._in_own_pass = False

    @property
    def complete(self) -> bool:
        return self.passes >= self.batches

    def arm(self) -> None:
        """Measure from the next forward pass with gradients on. Until then nothing changes."""
        before = self._before_forward if self.batch_size is None else self._pass_of_its_own
        self._armed.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        if self.batch_size is None:
            self._armed.callback(self.model.register_forward_hook(self._after_forward, always_call=True).remove)

    def disarm(self) -> None:
        """Leave the model as it was before."""
        self._armed.close()
        self._opened.close()

    def trained(self) -> dict[str, nn.Parameter]:
        """Disarm, and give the parameters that the step itself trains."""
        self.disarm()
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def read(self, candidates: Iterable[str]) -> tuple[CostGraph, dict[str, float]]:
        """Disarm, and give the cost graph of the passes and the mean importance per tensor."""
        assert self.complete
        self.disarm()
        importances = {name: total.item() / self.passes for name, total in self._sums.items()}
        return CostGraph.of(self._recorder, candidates), importances

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # an evaluation, or a reference model's pass
            return
        if self.complete:
            self._opened.close()
        else:
            self._open()
            self._recording.enter_context(self._recorder.forward())

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._recording.close()

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        self._opened.callback(setattr, self, "_is_open", False)
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                parameter.requires_grad_(True)
                self._opened.callback(parameter.requires_grad_, False)
                self._opened.callback(parameter.register_post_accumulate_grad_hook(free_gradient).remove)
            self._opened.callback(parameter.register_hook(partial(self._arrived, name)).remove)
        # Nothing tells when a backward pass begins; whoever starts one goes through this function.
        self._opened.callback(setattr, torch.autograd, "backward", torch.autograd.backward)
        torch.autograd.backward = self._recorded(torch.autograd.backward)

    def _recorded(self, backward: Callable[..., None]) -> Callable[..., None]:
        @wraps(backward)
        def recorded(*args: Any, **kwargs: Any) -> None:
            with self._recorder:
                backward(*args, **kwargs)
            self.passes += 1

        return recorded

    def _arrived(self, name: str, grad: Tensor) -> None:
        self._recorder.mark(name, grad)
        self._sums[name] = self._sums.get(name, 0.0) + self.measure(name, grad)

    def _pass_of_its_own(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.complete or self._in_own_pass or not torch.is_grad_enabled():
            return
        self._in_own_pass = True
        try:
            args, kwargs = first_rows(args, kwargs, self.batch_size)
            record(self._recorder, module, lambda: loss_of(module(*args, **kwargs)), self.parameters, self._arrived)
        finally:
            self._in_own_pass = False
        self.passes += 1


def first_rows(args: tuple, kwargs: dict[str, Any], rows: int) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a model for the first rows of a batch only.

    >>> first_rows((), {"input_ids": torch.zeros(4, 9), "position_ids": torch.zeros(1, 9)}, 2)[1]["input_ids"].shape
    torch.Size([2, 9])

    The first tensor tells how many rows the batch has; tensors whose first dimension is another stay whole.
    """
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0]
    if not tensors:
        raise ValueError("probe_batch_size needs a model that takes tensors; set it to None.")
    batch_size = len(tensors[0])

    def cut(value: Any) -> Any:
        of_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size
        return value[:rows] if of_batch else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
