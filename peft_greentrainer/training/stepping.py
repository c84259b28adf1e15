"""Which optimizers have taken a step, since when.

>>> mark = now()
>>> optimizer.step()
>>> stepped_since(mark)
[AdamW(...)]
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


_steps = 0
_last_step: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def now() -> int:
    """A mark for `stepped_since`."""
    return _steps


def stepped_since(mark: int) -> list[torch.optim.Optimizer]:
    """The optimizers, anywhere in the process, that have taken a step after this mark."""
    return [optimizer for optimizer, step in list(_last_step.items()) if step > mark]


@torch.compiler.disable
def _note(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    global _steps
    _steps += 1
    _last_step[optimizer] = _steps


def note_steps() -> None:
    """Note the steps of all optimizers from now on.

    This is a hook of torch for the whole process (`register_optimizer_step_post_hook`): an optimizer that was not handed
    over is known to no one else here, and a tensor that it trains must not be trained by another one, too. It keeps
    optimizers by weak references, and a number for each.
    """
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_note)


_handle = None
