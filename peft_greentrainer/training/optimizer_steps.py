"""Which optimizers have taken a step, and which of them were not handed over.

>>> record_steps()
>>> mark = step_count()
>>> optimizer.step()
>>> stepped_since(mark)
[AdamW(...)]
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..measuring.importance import unwrapped


_steps = 0
_last_step: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
_handle: RemovableHandle | None = None


def step_count() -> int:
    """The number of steps that all optimizers of the process have taken; a mark for `stepped_since`."""
    return _steps


def stepped_since(mark: int) -> list[torch.optim.Optimizer]:
    """The optimizers, anywhere in the process, that have taken a step after this mark."""
    return [optimizer for optimizer, step in list(_last_step.items()) if step > mark]


def _record(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _steps
    _steps += 1
    _last_step[optimizer] = _steps


def record_steps() -> None:
    """Record the steps of all optimizers from now on. Doing so again is harmless.

    This is a hook of torch for the whole process (`register_optimizer_step_post_hook`), for a reason: an optimizer that was
    not handed over is known to no one else here, and a tensor that it trains must not be trained by another one, too. It
    keeps optimizers by weak references, and a number for each. What holds it is
    tests/training/test_param_groups.py::test_a_tensor_of_another_optimizer_is_not_stepped_twice.
    """
    global _handle
    if _handle is None:
        hook = torch.compiler.disable(_record)
        _handle = register_optimizer_step_post_hook(hook)


class OtherOptimizers:
    """Optimizers that take steps beside those that are handed over.

    >>> others = OtherOptimizers()
    >>> others.find([optimizer])
    []
    """

    def __init__(self) -> None:
        self._handed_over: Set[torch.optim.Optimizer] = frozenset()  # no WeakSet, which cannot be pickled with a model
        self._began = step_count()  # training, with these optimizers

    def find(self, handed_over: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """The others that took a step since training with these optimizers began.

        A wrapper of an optimizer, accelerate's say, has the same groups and is not another one.
        """
        if set(handed_over) != set(self._handed_over):  # another training: who took steps before has no part in it
            self._handed_over, self._began = weakref.WeakSet(handed_over), step_count()
        own = [unwrapped(optimizer).param_groups for optimizer in handed_over]
        stepped = stepped_since(self._began)
        return [other for other in stepped if not any(other.param_groups is groups for groups in own)]
