"""Makes what stands in place of a module an instance of that module's class.

    >>> cls = with_class_of(GreenTrainerLayer, nn.Conv2d)
    >>> issubclass(cls, nn.Conv2d), cls.forward is GreenTrainerLayer.forward
    (True, True)

Models ask `isinstance(child, nn.Conv2d)` while they run, and every leaf of a model is wrapped. Such a class is that of
the wrapper in everything else: what the wrapper and `nn.Module` define comes first, and what only the module's class
defines is asked of the module itself (`_attribute`). Parents that hold a tensor of a child get a class of their own, too,
in which the tensor is the one that is trained (`read_through`).
"""

from __future__ import annotations

import functools
import types
from abc import ABCMeta
from typing import Any

from torch import nn


# What belongs to a class and not to its instances, what copies an instance, and what ends it.
_OF_CLASSES = {"__abstractmethods__", "__annotations__", "__orig_bases__", "__parameters__", "__slots__", "_abc_impl"}
_OF_CLASSES |= {"__copy__", "__deepcopy__", "__del__", *vars(type("", (), {}))}


class _SecondClass(ABCMeta):
    """The wrapper's class and its bases, `nn.Module` among them, come before that of the module."""

    def mro(cls) -> list[type]:
        if "_stands_for" not in vars(cls):  # a subclass, as `fully_shard` makes
            return super().mro()
        own, of_module = cls.__bases__
        return [cls, *own.__mro__[:-1], *(c for c in of_module.__mro__ if c not in own.__mro__), object]


@functools.cache
def with_class_of(own: type, of_module: type) -> type:
    """The subclass of `own` that is one of `of_module` too."""
    meta = _SecondClass
    if not issubclass(meta, type(of_module)):
        meta = type(meta.__name__, (meta, type(of_module)), {})
    namespace: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__, "_stands_for": (own, of_module)}
    for cls in of_module.__mro__:
        for name in vars(cls) if cls not in own.__mro__ else ():
            if name not in _OF_CLASSES and not hasattr(own, name):
                special = name.startswith("__") and name.endswith("__")
                namespace[name] = _special_method(name) if special else _attribute(name)
    # The module's own would be asked before those of `object`.
    namespace |= {"__getattribute__": object.__getattribute__, "__del__": lambda self: None}
    namespace |= {"__copy__": None, "__deepcopy__": None}
    return meta(own.__name__, (own, of_module), namespace)


def new_with_class_of(own: type, of_module: type) -> Any:
    """An instance that is not initialized yet: copies and what is unpickled are made so."""
    return object.__new__(with_class_of(own, of_module))


def _attribute(name: str) -> property:
    return property(lambda self: self._attribute(name))


def _special_method(name: str) -> Any:
    # Python looks for these in the class.
    return lambda self, *args, **kwargs: self._attribute(name)(*args, **kwargs)


READS = "_greentrainer_reads"


def read_through(holder: nn.Module, name: str, owner: nn.Module, owned: str) -> None:
    """Let a module that holds a tensor of a wrapped one read the tensor that is used there: the two are tied."""
    reads = vars(holder).setdefault(READS, {})
    reads[name] = (owner, owned)
    holder.__class__ = _reader(_without_reads(type(holder)), tuple(sorted(reads)))


def stop_reading(holder: nn.Module) -> None:
    """Make the module what it was before `read_through`."""
    if vars(holder).pop(READS, None) is not None:
        holder.__class__ = _without_reads(type(holder))


def _without_reads(cls: type) -> type:
    return vars(cls).get("_reads_for", cls)


@functools.cache
def _reader(cls: type, names: tuple[str, ...]) -> type:
    def read(name: str) -> property:
        def effective(self: nn.Module) -> Any:
            owner, owned = vars(self)[READS][name]
            return owner.effective_tensor(owned)

        return property(effective)

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _new_reader, (cls, names), self.__dict__

    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_reads_for": cls, "__reduce_ex__": reduce}
    namespace |= {name: read(name) for name in names}
    return types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(namespace))


def _new_reader(cls: type, names: tuple[str, ...]) -> Any:
    return object.__new__(_reader(cls, names))
