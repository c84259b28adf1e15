"""The blocks of a decoder, and what is done to them while the prompts are read.

    >>> with one_hop(blocks_of(model.model)):
    ...     model.model(input_ids=prompts, use_cache=True)    # the graph that stays is that of keys and values

Decoder blocks of transformers are `GradientCheckpointingLayer`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The outermost blocks, in the order of the model."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in backbone.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside |= set(map(id, module.modules()))
    return found


@contextmanager
def one_hop(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let every block detach what it is given: gradients reach what it makes of it, and nothing deeper."""
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(_detach, with_kwargs=True).remove)
        yield


@contextmanager
def without_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """Gradient checkpointing drops a cache: whole models ask their own flag, blocks theirs."""
    checkpointed = [m for m in backbone.modules() if vars(m).get("gradient_checkpointing") is True]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def _detach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _detached(args), _detached(kwargs)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    if type(value) is dict:
        return {name: _detached(entry) for name, entry in value.items()}
    return value
