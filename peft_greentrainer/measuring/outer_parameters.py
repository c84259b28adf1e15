"""What is trained around a base model: the head of a module that holds it, say. It has its share of the budget.

>>> outer_parameters(base, holders=enclosing_modules(base, nn.Module))
{'(outside).head.weight': Parameter(...), '(outside).head.bias': Parameter(...)}
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..tensors.names import OUTSIDE, base_name
from ..tensors.trainable import can_be_trained


def outer_parameters(model: nn.Module, holders: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """What the modules that a base model is a part of train, such as a head: no name in the base begins with OUTSIDE."""
    inside = set(map(id, model.parameters()))
    found: dict[str, nn.Parameter] = {}
    # The outermost first: there a parameter has its whole name.
    outer = sorted(holders, key=lambda module: -sum(1 for _ in module.modules()))
    for module in outer:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and can_be_trained(parameter) and id(parameter) not in inside:
                inside.add(id(parameter))
                name = OUTSIDE + base_name(name)
                # Two models around the same base, of which one may be of an earlier training.
                found[name if name not in found else f"{name} ({len(found)})"] = parameter
    return found
