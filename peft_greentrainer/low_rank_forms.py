"""The low-rank forms of a wrapped model, as a probe needs them.

>>> Probe(base, parameters, measure=measure, forms=forms_of(base, "default"))
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .forms import low_rank_form, tensor_of
from .linear import GreenTrainerLinear
from .low_rank_cost import LowRank
from .low_rank_update import LowRankForm, seed_of
from .values import candidates, layers


def forms_of(model: nn.Module, adapter_name: str) -> LowRank:
    """The low-rank forms that the adapter offers, and those that it has; provisional ones may be gone after a probe."""
    config = model.peft_config[adapter_name]
    form = LowRankForm.of(config)
    linear, updates, first_factor, frozen = {}, [], {}, {}
    offered = set(candidates(model, config))
    lasting = set() if config.provisional else config.tensors.keys()
    for key, layer in layers(model).items():
        if isinstance(layer, GreenTrainerLinear):
            if hasattr(layer, "greentrainer_update"):
                updates.append(layer.greentrainer_update)
            candidate = low_rank_form(f"{key}.weight")
            if candidate in offered and tensor_of(candidate) not in offered:
                frozen[tensor_of(candidate)] = layer.base_layer
            if candidate in offered - lasting:
                linear[candidate] = layer.base_layer
                first_factor[candidate] = partial(_scaled_first_factor, form, layer.in_features, seed_of(candidate))
    return LowRank(form.rank, linear, tuple(updates), config.provisional, first_factor, frozen)


def _scaled_first_factor(form: LowRankForm, in_features: int, seed: int) -> Tensor:
    return form.scale * form.first_factor(in_features, seed)


def cost_of_updates(model: nn.Module) -> float:
    """At most what the updates that exist cost in a step, in steps of full fine-tuning: FLOPs grow with weights."""
    wrappers = [layer for layer in layers(model).values() if isinstance(layer, GreenTrainerLinear)]
    added = sum(factor.numel() for layer in wrappers for factor in layer.all_factors())
    return added / max(1, sum(layer.base_layer.weight.numel() for layer in wrappers))
