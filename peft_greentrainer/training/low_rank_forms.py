"""The low-rank forms of a wrapped model, as a probe needs them.

>>> Probe(base, parameters, measure=measure, forms=low_rank_forms(base, "default"))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..adapter.candidates import candidates_of
from ..adapter.linear import GreenTrainerLinear
from ..adapter.values import config_of, layers
from ..measuring.low_rank import LowRankForms
from ..tensors.forms import LowRankForm, seed_of
from ..tensors.names import low_rank_form


def low_rank_forms(model: nn.Module, adapter_name: str) -> LowRankForms:
    """The low-rank forms that the adapter offers, and those that it has; provisional ones may be gone after a probe."""
    config = config_of(model, adapter_name)
    form = config.form
    candidates, wrappers = candidates_of(model, adapter_name), layers(model)
    offered = set(candidates.names)
    lasting = set() if config.provisional else set(config.tensors or ())
    linear: dict[str, nn.Module] = {}
    first_factor: dict[str, Callable[[], Tensor]] = {}
    frozen: dict[nn.Module, str] = {}
    for key, tensor in candidates.uses():
        layer: Any = wrappers[key]
        candidate = low_rank_form(tensor)
        if tensor not in offered:
            frozen[layer.base_layer] = tensor
        if candidate in offered and candidate not in lasting:
            linear[candidate] = layer.base_layer
            first_factor[candidate] = partial(_scaled_first_factor, form, layer.in_features, seed_of(candidate))
    updates = [layer.greentrainer_update for layer in wrappers.values() if hasattr(layer, "greentrainer_update")]
    return LowRankForms(form.rank, linear, tuple(updates), config.provisional, first_factor, frozen)


def _scaled_first_factor(form: LowRankForm, in_features: int, seed: int) -> Tensor:
    return form.scale * form.first_factor(in_features, seed)


def cost_of_updates(model: nn.Module) -> float:
    """At most what the updates that exist cost in a step, in steps of full fine-tuning: FLOPs grow with weights."""
    wrappers = [layer for layer in layers(model).values() if isinstance(layer, GreenTrainerLinear)]
    added = sum(factor.numel() for layer in wrappers for factor in layer.all_factors())
    weights: list[Tensor] = [layer.base_layer.get_parameter("weight") for layer in wrappers]
    return added / max(1, sum(weight.numel() for weight in weights))
