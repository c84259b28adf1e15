"""Makes the probe that an adapter's config asks for.

>>> holders = enclosing_modules(base_model, nn.Module)
>>> probe = new_probe(base_model, "default", config, setup, placement, holders)
>>> probe.arm(holders)                                 # the next step is measured
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..adapter.candidates import candidates_of
from ..adapter.config import GreenTrainerConfig
from ..adapter.values import parameters_in_use
from ..measuring.importance import CrossBatch, Measure, SameBatch, update_rule
from ..measuring.low_rank import LowRankForms
from ..measuring.outer_parameters import outer_parameters
from ..measuring.probe import Probe
from ..tensors.names import candidate_of
from .low_rank_forms import low_rank_forms
from .placement import OptimizerSetup, Placement
from .probe_inputs import FirstRows


def new_probe(
    model: nn.Module,
    adapter_name: str,
    config: GreenTrainerConfig,
    setup: OptimizerSetup,
    placement: Placement,
    holders: Iterable[nn.Module],
) -> Probe:
    """A probe that is not armed yet.

    Args:
        model: the base model.
        adapter_name: the adapter that is trained.
        config: its config.
        setup: the optimizers; the first one's rule is that of tensors that have no place.
        placement: the group, and with it the learning rate, of each tensor.
        holders: the modules that the base model is a part of.
    """
    rule = update_rule(setup.optimizers[0])
    rules = {name: update_rule(optimizer) for name, optimizer in placement.optimizers.items()}
    rates = _learning_rates(placement)
    # Every parameter that full fine-tuning would train, by its name in the base model: values for base tensors, the factors
    # of low-rank updates, and what a model around the base trains.
    parameters = outer_parameters(model, holders) | parameters_in_use(model, adapter_name)
    if config.provisional:  # factors that may be gone are measured like those that do not exist yet
        parameters = {name: p for name, p in parameters.items() if candidate_of(name) == name}
    measure: Measure = SameBatch(rule, rates, rules)
    batches, forms = config.importance_batches, LowRankForms()
    if config.low_rank:  # each batch judges what was made from the one before
        forms = low_rank_forms(model, adapter_name)
        without_gradient = set(forms.frozen.values())
        parameters = {name: p for name, p in parameters.items() if name not in without_gradient}
        measure = CrossBatch(rule, rates, set(candidates_of(model, adapter_name).names), rules)
        batches += 1
    return Probe(
        model,
        parameters,
        measure=measure,
        batches=batches,
        part=None if config.probe_batch_size is None else FirstRows(config.probe_batch_size),
        time_with=setup.optimizers[0] if config.unit == "seconds" else None,
        forms=forms,
    )


def _learning_rates(placement: Placement) -> dict[str, float]:
    rates = {name: float(g.get("initial_lr", g["lr"]) or 0.0) for name, g in placement.groups.items()}
    if any(rates.values()):
        return rates
    return dict.fromkeys(rates, 1.0)  # none given, or a warm-up that starts at zero; only proportions matter
