"""Finds what a model was wrapped in, which the model itself does not know.

>>> enclosing_modules(model, DistributedDataParallel)
[DistributedDataParallel(...)]
"""

from __future__ import annotations

import gc
from collections import defaultdict
from itertools import compress
from typing import TypeVar

from torch import nn


C = TypeVar("C")
T = TypeVar("T", bound=nn.Module)


def enclosing_modules(model: nn.Module, cls: type[T]) -> list[T]:
    """The model, where it is one, and the modules of this class, anywhere in the process, that it is a part of.

    It looks at all objects of the process, a tenth of a second where there are a million.
    """
    holders = defaultdict(list)
    for module in instances(nn.Module):
        # One that failed while it was made or copied has no parts, and lives as long as somebody has the traceback.
        for child in vars(module).get("_modules", {}).values():
            holders[id(child)].append(module)
    found = {id(model): model}
    left = [model]
    while left:
        for holder in holders[id(left.pop())]:
            if id(holder) not in found:
                found[id(holder)] = holder
                left.append(holder)
    return [module for module in found.values() if isinstance(module, cls)]


def instances(cls: type[C]) -> list[C]:
    """The objects of a class and its subclasses, anywhere in the process.

    >>> instances(torch.optim.Optimizer)
    [AdamW(...)]
    """
    classes, left = {cls}, [cls]
    while left:
        new = set(left.pop().__subclasses__()) - classes
        classes |= new
        left += new
    objects = gc.get_objects()
    return list(compress(objects, map(classes.__contains__, map(type, objects))))
