"""Makes what stands in place of a module an instance of that module's class.

    >>> cls = with_class_of(GreenTrainerLayer, nn.Conv2d)
    >>> issubclass(cls, nn.Conv2d), cls.forward is GreenTrainerLayer.forward
    (True, True)

Models ask `isinstance(child, nn.Conv2d)` while they run, and every leaf of a model is wrapped. Such a class is that of
the wrapper in everything else: what the wrapper and `nn.Module` define comes first, and what only the module's class
defines is asked of the module itself (`_attribute`). Who looks at all modules of a model finds one of that class, as
before.
"""

from __future__ import annotations

import functools
import weakref
from abc import ABCMeta
from typing import Any

from torch import nn


# What is of a class, and not of its instances.
_OF_CLASSES = {"__abstractmethods__", "__annotations__", "__orig_bases__", "__parameters__", "__slots__", "_abc_impl"}
_OF_CLASSES |= {*vars(type("", (), {}))}
# What Python would ask the module's class for before `object`, and has to do for the wrapper.
_OF_OBJECTS: dict[str, Any] = {"__getattribute__": object.__getattribute__, "__del__": lambda self: None}
_OF_OBJECTS |= {"__copy__": None, "__deepcopy__": None}


class _SecondClass(ABCMeta):
    """The wrapper's class and its bases, `nn.Module` among them, come before that of the module."""

    def mro(cls) -> list[type]:
        if "_stands_for" not in vars(cls):  # a subclass, as `fully_shard` makes
            return super().mro()
        own, of_module = cls.__bases__
        return [cls, *own.__mro__[:-1], *(c for c in of_module.__mro__ if c not in own.__mro__), object]


@functools.cache
def with_class_of(own: type, of_module: type) -> Any:
    """The subclass of `own` that is one of `of_module` too."""
    meta: type = _SecondClass
    if not issubclass(meta, type(of_module)):
        meta = type(meta.__name__, (meta, type(of_module)), {})
    namespace: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__, "_stands_for": (own, of_module)}
    names = {name for cls in of_module.__mro__ if cls not in own.__mro__ for name in vars(cls)}
    for name in names - _OF_CLASSES:
        if name in _OF_OBJECTS:
            namespace[name] = _OF_OBJECTS[name]
        elif not hasattr(own, name):
            special = name.startswith("__") and name.endswith("__")
            namespace[name] = _special_method(name) if special else _attribute(name)
    return meta(own.__name__, (own, of_module), namespace)


def new_with_class_of(own: type, of_module: type) -> Any:
    """An instance that is not initialized yet: copies and what is unpickled are made so."""
    return object.__new__(with_class_of(own, of_module))


def _attribute(name: str) -> property:
    return property(lambda self: self._attribute(name))


def _special_method(name: str) -> Any:
    # Python looks for these in the class.
    return lambda self, *args, **kwargs: self._attribute(name)(*args, **kwargs)


class Inside(nn.Module):
    """What `modules()` shows of a module that is wrapped: what every module has, as parameters, buffers, hooks, its mode.

    What its class has is found on the wrapper. If it were found on both, whoever sums over all modules would count twice.
    """

    _module: weakref.ref[nn.Module]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        of_all = (vars(self).keys() & vars(module).keys()) - {"_modules"}
        vars(self).update({name: vars(module)[name] for name in of_all}, _module=weakref.ref(module))

    @property
    def training(self) -> bool:
        return self._wrapped.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_module" in self.__dict__:  # not yet, in `nn.Module.__init__`
            self._wrapped.training = mode

    @property
    def _wrapped(self) -> nn.Module:
        module = self._module()
        assert module is not None  # the wrapper has it, and who sees this has found it there
        return module


_insides: weakref.WeakKeyDictionary[nn.Module, Inside] = weakref.WeakKeyDictionary()


def inside_of(module: nn.Module) -> Inside:
    """The same one each time: code that looks at all modules remembers them."""
    if module not in _insides:
        _insides[module] = Inside(module)
    return _insides[module]
