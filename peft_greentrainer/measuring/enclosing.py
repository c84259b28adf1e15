"""Finds what a model was wrapped in, which the model itself does not know.

>>> enclosing_modules(model, DistributedDataParallel)
[DistributedDataParallel(...)]
"""

from __future__ import annotations

import gc
from typing import TypeVar

from torch import nn


T = TypeVar("T", bound=nn.Module)


def enclosing_modules(model: nn.Module, cls: type[T]) -> list[T]:
    """The modules of this class, anywhere in the process, that `model` is a part of. Takes some milliseconds."""
    objects = gc.get_objects()
    classes = {found for found in set(map(type, objects)) if issubclass(found, cls)}
    # A module that failed while it was made or copied has no parts, and lives as long as somebody has the traceback.
    wrappers = [o for o in objects if type(o) in classes and "_modules" in vars(o)]
    return [wrapper for wrapper in wrappers if any(module is model for module in wrapper.modules())]
