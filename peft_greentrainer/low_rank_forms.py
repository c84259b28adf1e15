"""The low-rank forms of a wrapped model, as a probe needs them.

>>> forms = forms_of(base, "default")
>>> Probe(base, parameters, measure=CrossBatch(..., forms.gradient_of_b), forms=forms.costed)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from .forms import is_low_rank, low_rank_form, tensor_of
from .linear import GreenTrainerLinear
from .low_rank_cost import LowRank
from .low_rank_update import LowRankForm, seed_of
from .values import candidates, layers


class Forms(NamedTuple):
    """What to note the cost of, and for tensors without factors what makes their gradient that of the factor B."""

    costed: LowRank
    gradient_of_b: dict[str, Callable[[Tensor], Tensor]]


def forms_of(model: nn.Module, adapter_name: str) -> Forms:
    """The low-rank forms that the adapter offers, and those that it has; provisional ones may be gone after a probe."""
    config = model.peft_config[adapter_name]
    form = LowRankForm.of(config)
    linear, updates, gradient_of_b = {}, [], {}
    offered = set(filter(is_low_rank, candidates(model, config)))
    lasting = set() if config.provisional else config.tensors.keys()
    for key, layer in layers(model).items():
        if isinstance(layer, GreenTrainerLinear):
            if hasattr(layer, "greentrainer_update"):
                updates.append(layer.greentrainer_update)
            candidate = low_rank_form(f"{key}.weight")
            if candidate in offered - lasting:
                linear[candidate] = layer.base_layer
                gradient_of_b[tensor_of(candidate)] = partial(layer.gradient_of_b, form, seed_of(candidate))
    return Forms(LowRank(form.rank, linear, tuple(updates), config.provisional), gradient_of_b)


def cost_of_updates(model: nn.Module) -> float:
    """At most what the updates that exist cost in a step, in steps of full fine-tuning: FLOPs grow with weights."""
    wrappers = [layer for layer in layers(model).values() if isinstance(layer, GreenTrainerLinear)]
    added = sum(factor.numel() for layer in wrappers for factor in layer.all_factors())
    return added / max(1, sum(layer.base_layer.weight.numel() for layer in wrappers))
