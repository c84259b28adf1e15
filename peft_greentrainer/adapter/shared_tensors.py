"""Lets a module that holds a tensor of a wrapped one read the tensor that is used there.

    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embedding = nn.Embedding(8, 4)
    ...         self.output = self.embedding.weight
    >>> read_through(tied, "output", owner=tied.embedding, owned="weight")    # once the embedding is wrapped
    >>> tied.output is tied.embedding.weight
    True

The two are one tensor, and so they stay when it is trained. The module gets a class of its own, in which the tensor is a
property, as `torch.nn.utils.parametrize` does it: the effective tensor is another one at each step, and code reads it as an
attribute. Other modules of its class stay as they are, and so does the module once it is unloaded.
"""

from __future__ import annotations

import functools
from typing import Any, SupportsIndex, cast

from torch import Tensor, nn


READS = "_greentrainer_reads"


class _Reader:
    """What the classes of such modules have in common."""

    _reads_for: type[nn.Module]
    _names: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not run that of the module's class, which may keep a register of its subclasses."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new_reader, (self._reads_for, self._names), self.__dict__


def read_through(module: nn.Module, name: str, owner: nn.Module, owned: str) -> None:
    """Let the tensor `name` of the module be the effective tensor `owned` of a wrapper."""
    reads = vars(module).setdefault(READS, {})
    reads[name] = (owner, owned)
    cls: Any = type(module)
    module.__class__ = _reader(cls._reads_for if issubclass(cls, _Reader) else cls, tuple(sorted(reads)))


def stop_reading(module: nn.Module) -> None:
    """Make the module what it was before `read_through`."""
    if READS in vars(module):
        module.__class__ = cast(_Reader, module)._reads_for
        del vars(module)[READS]


@functools.cache
def _reader(cls: Any, names: tuple[str, ...]) -> Any:
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_reads_for": cls, "_names": names}
    properties = {name: property(_effective(name)) for name in names}
    return type(cls)(cls.__name__, (_Reader, cls), namespace | properties)


def _effective(name: str) -> Any:
    def effective(self: nn.Module) -> Tensor:
        owner, owned = vars(self)[READS][name]
        return cast(Tensor, owner.effective_tensor(owned))

    return effective


def _new_reader(cls: Any, names: tuple[str, ...]) -> Any:
    return object.__new__(_reader(cls, names))
