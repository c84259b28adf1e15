"""Activations that are made to require grad: their gradients are computed in every step, whatever is trained.

    >>> with NoticeForcedGradient(operations):        # as CostRecorder does
    ...     embeddings.requires_grad_(True)           # in a hook of gradient checkpointing, say

transformers, peft and trl do so to the output of the input embedding when gradient checkpointing is switched on, because
reentrant checkpointing trains nothing without; T5 does so to an attention bias that is all zeros. It costs every
activation gradient from the loss down to that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .operations import Operations


# A new object at every access, so it is compared by equality.
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]  # on the class it is a descriptor


class NoticeForcedGradient(TorchFunctionMode):
    """Notes the gradients of activations that are made to require grad among the operations that every step runs."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.requires_grad_ or func == _SET_REQUIRES_GRAD:
            tensor = args[0]
            if torch.is_grad_enabled() and tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
                tensor.register_hook(self.operations.force)
        return out
