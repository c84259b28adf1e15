"""Tells gradient checkpointing, which runs a segment of the forward pass again, from passes that a step makes of its own.

    >>> def hook(grad):                               # of a tensor, or the backward of a custom function
    ...     with torch.enable_grad():
    ...         model(**part).loss.backward()         # a pass of its own: is_recomputing() is false in it

Both run operations with gradients on inside of a backward pass. Checkpointing that is not reentrant runs them where autograd
asks for a tensor that was not saved, so the function of torch that is asked is among those that are running. Patching it
would have to be undone, and asking for the innermost hook on saved tensors fails where a segment has hooks of its own.
Reentrant checkpointing is a custom function of autograd, and whoever writes one calls it so.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch.autograd.function import BackwardCFunction


def is_recomputing() -> bool:
    """Whether what runs now is a segment that gradient checkpointing runs again."""
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    if isinstance(node, BackwardCFunction) and "checkpoint" in node._forward_cls.__name__.lower():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "unpack" in frame.f_code.co_name and "checkpoint" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False
