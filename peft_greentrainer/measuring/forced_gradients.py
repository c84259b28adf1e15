"""Activations that are made to require grad: their gradients are computed in every step, whatever is trained.

    >>> with NoticeForcedGradient(recorder):          # as CostRecorder does
    ...     embeddings.requires_grad_(True)           # in a hook of gradient checkpointing, say

transformers, peft and trl do so to the output of the input embedding when gradient checkpointing is switched on, because
reentrant checkpointing trains nothing without; T5 does so to an attention bias that is all zeros. It costs every
activation gradient from the loss down to that tensor.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


# A new object at every access, so it is compared by equality.
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__


class Recorder(Protocol):
    """What is asked of a recorder."""

    def force(self, grad: Tensor) -> None: ...


class NoticeForcedGradient(TorchFunctionMode):
    """While active, tells a recorder of the gradients of activations that are made to require grad."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is Tensor.requires_grad_ or func == _SET_REQUIRES_GRAD:
            tensor = args[0]
            if torch.is_grad_enabled() and tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
                tensor.register_hook(self.recorder.force)
        return out
