"""Puts a mode under all others, from where it can be taken out at any time.

    >>> put_at_bottom(recorder)                       # sees what runs in the loop, between two calls of a model
    >>> take_from_bottom(recorder)
    True

Modes are entered and left like a stack. One that stays on between two calls of the user's cannot keep to that on top, where it
would be in the way of a mode that the user enters before and leaves in between (a FLOP counter, say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


Mode = TorchDispatchMode | TorchFunctionMode


@dataclass(frozen=True)
class _Stack:
    """Torch's own functions for one of its two stacks of modes."""

    size: Callable[[], int]
    at: Callable[[int], Mode]
    pop: Callable[[], Any]
    push: Callable[[Any], None]


_DISPATCH = _Stack(
    torch._C._len_torch_dispatch_stack,
    torch._C._get_dispatch_stack_at,
    lambda: torch._C._pop_torch_dispatch_stack(None),
    torch._C._push_on_torch_dispatch_stack,
)
_FUNCTION = _Stack(
    torch._C._len_torch_function_stack,
    torch._C._get_function_stack_at,
    torch._C._pop_torch_function_stack,
    torch._C._push_on_torch_function_stack,
)


def put_at_bottom(mode: Mode) -> None:
    stack = _stack_of(mode)
    _replace(stack, [mode, *_entered(stack)])


def take_from_bottom(mode: Mode) -> bool:
    """False where it is not there: in another thread, or while it is dispatched to."""
    stack = _stack_of(mode)
    others = [other for other in _entered(stack) if other is not mode]
    if len(others) == len(_entered(stack)):
        return False
    _replace(stack, others)
    return True


@contextmanager
def at_bottom(mode: Mode) -> Iterator[None]:
    put_at_bottom(mode)
    try:
        yield
    finally:
        take_from_bottom(mode)


def _stack_of(mode: Mode) -> _Stack:
    return _DISPATCH if isinstance(mode, TorchDispatchMode) else _FUNCTION


def _entered(stack: _Stack) -> list[Mode]:
    """The modes that are on, but for those of torch itself, which have places of their own below."""
    modes = [stack.at(i) for i in range(stack.size())]
    return [mode for mode in modes if getattr(mode, "_mode_key", None) is None]


def _replace(stack: _Stack, modes: list[Mode]) -> None:
    for _ in _entered(stack):
        stack.pop()
    for mode in modes:
        stack.push(mode)
