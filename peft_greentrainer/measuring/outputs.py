"""Finds the loss, and tensors, in whatever a model returns: mappings, sequences, dataclasses, objects with attributes.

>>> loss_in({"task": SimpleNamespace(loss=loss, logits=logits)}) is loss
True
>>> len(tensors_of([logits, {"hidden": (first, second)}]))
3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output, at any depth."""
    return [value for value in _walk(output) if isinstance(value, Tensor)]


def loss_in(output: Any) -> Tensor | None:
    """The outermost tensor called `loss` in an output; the output itself, where it is a scalar."""
    if isinstance(output, Tensor) and output.dim() == 0:
        return output
    for value in _walk(output):
        if not isinstance(value, Tensor):
            loss = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
            if isinstance(loss, Tensor):
                return loss
    return None


def _walk(output: Any) -> Iterator[Any]:
    """The output and all that it holds, what is nearer first."""
    level = [output]
    seen: set[int] = set()
    while level:
        level = [value for value in level if id(value) not in seen]
        seen.update(map(id, level))
        yield from level
        level = [held for value in level for held in _held(value)]


def _held(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, (Tensor, nn.Module)) or callable(value):
        return []
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
