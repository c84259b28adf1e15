"""Notices whoever enters a model: by a call of it, of one of its parts, of one of its methods, or of what holds it.

    >>> calls = Calls(model, entered=print, left=print)
    >>> calls.install(holders=enclosing_modules(model, nn.Module))
    >>> model.compute_loss(batch)                     # a method that calls parts of the model
    >>> calls.remove()

Only modules tell when they are called. A method is noticed through an attribute of the same name on its model, which hides
it until it is taken away; it may be one that runs nothing, so it counts as entered once it calls a module, or computes with
a parameter that is frozen.

What this changes in the user's modules, from `install` to `remove`: hooks of modules before and after forward, and the
attributes that stand in for methods. A loop may call `model.compute_loss` and nothing else, and a method of Python's has no
hooks. Copies and pickles of a model are made meanwhile too; in these, hooks and stand-ins do nothing.
tests/measuring/test_passes.py holds that a model has its plain methods after a probe, and a copy has them at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .mode_stack import at_bottom
from .recomputation import is_recomputing


# Their own modules are entered, and none of their methods runs the model but through those.
LIBRARIES = ("peft", "peft_greentrainer", "accelerate", "lightning", "pytorch_lightning", "torch")


# What may be asked of a parameter without computing with it, apart from its attributes.
TELL_ONLY = frozenset(
    "__get__ __set__ __len__ __repr__ __hash__ numel nelement element_size size stride dim ndimension type data_ptr "
    "is_floating_point is_complex is_contiguous get_device requires_grad_ register_hook detach".split()
)
# Modules that do nothing but call what they hold.
ONLY_PASS_ON = ("peft.", "peft_greentrainer.", "torch.nn.parallel.", "torch._dynamo.")


class Call:
    """A call that has not returned.

    Attributes:
        key: the module, or what stands in for the method, that was called.
        module: the module, whose method it may be.
        function: what was called, so that it can be called again.
        args, kwargs: with what.
        has_gradients: whether they were on when it was called.
    """

    def __init__(
        self, key: Any, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.key, self.module, self.function, self.args, self.kwargs = key, module, function, args, kwargs
        self.has_gradients = torch.is_grad_enabled()


class Calls:
    """The calls into a model that have not returned, the outermost first.

    Args:
        model: the model. Its parts count, and its methods.
        entered: is called with them when a module is called, before it runs, and when a method computes with a frozen
            parameter.
        left: is called with them, and with what the last of them returns, None after an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        entered: Callable[[list[Call]], None],
        left: Callable[[list[Call], Any], None] = lambda running, output: None,
    ) -> None:
        self.model = model
        self.running: list[Call] = []
        self._entered, self._left = entered, left
        self._installed = ExitStack()

    def install(self, holders: Iterable[nn.Module]) -> None:
        """Notice calls from now on, also of the modules that hold the model, and of their methods."""
        holders = [h for h in holders if h is not self.model and not type(h).__module__.startswith(ONLY_PASS_ON)]
        for module in {*self.model.modules(), *holders}:
            before, after = ModuleHook(self._before), ModuleHook(self._after)
            self._installed.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._installed.callback(module.register_forward_hook(after, always_call=True).remove)
        for module in [self.model, *holders]:
            for name in _own_methods(module):
                vars(module)[name] = _stand_in(self, module, name)
                self._installed.callback(vars(module).pop, name, None)

    def remove(self) -> None:
        self._installed.close()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_recomputing():
            self.running.append(Call(module, module, module, args, kwargs))
            self.entered()

    def entered(self) -> None:
        """Something is about to be computed in the last of the calls."""
        self._entered(self.running)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not is_recomputing():
            self.leave(module, output)

    def leave(self, key: Any, output: Any) -> None:
        """The call of `key` returns, and with it calls inside that an interrupt has kept from telling so."""
        if not any(call.key is key for call in self.running):  # a hook has raised before ours saw the call
            return
        while self.running[-1].key is not key:
            self._left(self.running, None)
            self.running.pop()
        self._left(self.running, output)
        self.running.pop()


class _NoticeUse(TorchFunctionMode):
    """While active, notices what computes with a parameter that is frozen."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        frozen = (arg for arg in args if isinstance(arg, nn.Parameter) and not arg.requires_grad)
        if getattr(func, "__name__", "") not in TELL_ONLY and any(True for _ in frozen) and not is_recomputing():
            self.calls.entered()
        return func(*args, **(kwargs or {}))


class ModuleHook:
    """A hook of a module of which copies, and what is unpickled, do nothing: it is of this module only."""

    def __init__(self, method: Callable[..., None]) -> None:
        self.method = method

    def __call__(self, *args: Any) -> None:
        self.method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (_do_nothing,)


def _stand_in(calls: Calls, module: nn.Module, name: str) -> MethodType:
    """A method of a module that tells of its calls; that of a copy does not, and what is unpickled is the method itself."""
    function = getattr(type(module), name)

    @wraps(function)
    def entered(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return function(self, *args, **kwargs)
        calls.running.append(Call(entered, module, MethodType(function, module), args, kwargs))
        output = None
        try:
            with at_bottom(_NoticeUse(calls)):
                output = function(self, *args, **kwargs)
            return output
        finally:
            calls.leave(entered, output)

    return MethodType(entered, module)


def _do_nothing(*args: Any) -> None:
    pass


def _own_methods(module: nn.Module) -> list[str]:
    """The public methods that are of this model alone: not those of any module, nor of the libraries that it comes from."""
    found: dict[str, type | None] = {}
    for cls in type(module).__mro__:
        for name, value in vars(cls).items():
            found.setdefault(name, cls if inspect.isfunction(value) else None)
    return [
        name
        for name, cls in found.items()
        if cls is not None
        and cls.__module__.partition(".")[0] not in LIBRARIES
        and not name.startswith("_")
        and not hasattr(nn.Module, name)
        and name not in vars(module)
    ]
