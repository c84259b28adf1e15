"""Decides when to probe, and turns what a probe measured into a selection that is applied to model and optimizer.

    >>> allocator = allocator_of(base_model)
    >>> allocator.update(step, optimizer)             # after every step
    >>> allocator.selection.ratio                     # what a step costs now, over full fine-tuning
    0.4998

One allocator per base model, kept on it: `GreenTrainerModel.update_and_allocate` and `GreenTrainerCallback` use the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .averaging import update_averages
from .checkpointing import REENTRANT, can_save
from .config import GreenTrainerConfig
from .cost import CostGraph
from .delta import VALUES, base_name
from .distributed import (
    from_first_rank,
    mean_over_ranks,
    of_all_ranks,
    of_this_rank,
    rebuild_reducers,
    refuse_sharded,
)
from .forms import candidate_of
from .importance import is_known, unwrapped, update_rule
from .low_rank_forms import cost_of_updates, forms_of
from .measure import CrossBatch, SameBatch
from .param_groups import group_of, keep_in_step
from .probe import Probe
from .selection import Selection, everything_fits, select
from .trainable import can_be_trained
from .values import candidates, follow_layers, layers, set_selection, set_trainable, set_values


def allocator_of(model: nn.Module) -> Allocator:
    """The allocator of a base model that has GreenTrainer layers."""
    if not hasattr(model, "_greentrainer_allocator"):
        model._greentrainer_allocator = Allocator(model)
    return model._greentrainer_allocator


class Allocator:
    """Probes and selects while a model is trained.

    Attributes:
        selection: the last selection, or None before the first.
        graph: the cost graph that it was made with.
        importances: the importances that it was made with.
        steps_seen: for the callback, the last step that it has reported.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.selection: Selection | None = None
        self.graph: CostGraph | None = None
        self.importances: dict[str, float] = {}
        self.steps_seen = 0
        self._config: GreenTrainerConfig | None = None
        self._probe: Probe | None = None
        self._last: int | None = None
        self._measured: list[dict[str, Any]] | None = None  # what each rank's probe has so far
        self._passes_before = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_probe": None}  # copies of the model are not probed

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Probe the very next step if nothing was selected yet; call it before the first step where that is possible."""
        adapter_name, config = self._active_adapter()
        self._keep_saving()
        self._settle()
        set_trainable(self.model, adapter_name, config.selected)
        rebuild_reducers(self.model)
        if self.selection is None and self._probe is None:
            self._arm(optimizer)
        self._last = step

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed has to know, as JSON; nothing before the first step."""
        config, made = self._config, self.selection
        if config is None:
            return {}
        return {
            "selected": config.selected,
            "provisional": config.provisional,
            "spent": config.spent,
            "selection": made and asdict(made) | {"tensors": sorted(made.tensors), "low_rank": sorted(made.low_rank)},
            "importances": self.importances,
            "last": self._last,
            "probe": self._measured,
        }

    def resume(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Go on where a run was stopped, with the values and the optimizer's state of its checkpoint loaded before."""
        adapter_name, config = self._active_adapter()
        self.end()
        self._keep_saving()
        self._settle()
        set_selection(self.model, adapter_name, state["selected"], state["provisional"])
        config.spent = state["spent"]
        kept = state["selection"]
        of_sets = kept and {name: frozenset(kept.get(name, ())) for name in ("tensors", "low_rank")}
        self.selection = kept and Selection(**kept | of_sets)
        self.importances = dict(state["importances"])
        self._last = state["last"]
        if state["probe"] is not None:
            self._arm(optimizer)
            self._probe.load_state_dict(of_this_rank(state["probe"]))
            self._passes_before = self._probe.passes
        rebuild_reducers(self.model)

    def update(self, step: int, optimizer: torch.optim.Optimizer, epoch: int | None = None) -> None:
        """Select if the step that was just taken completed a probe; make the next step a probe if one is due."""
        adapter_name, config = self._active_adapter()
        self._keep_saving()
        if config.was_reloaded():
            set_trainable(self.model, adapter_name, config.selected)
        cost = self._cost_of_step()
        now = step
        if config.reselect == "epoch":
            if epoch is None:
                raise ValueError(
                    "reselect='epoch' has to know the epoch: call update_and_allocate(step, optimizer, epoch=epoch), or "
                    "set reselect to a number of steps."
                )
            now = epoch

        if self._probe is not None and self._probe.passes == self._passes_before:
            self._probe.close()
            self._warn_once(
                "A step was to be a probe, and no forward and backward pass of the model was seen in it, so nothing was "
                "measured; the next step is a probe again. Call the model itself, not a part of it, and then loss.backward()."
            )
        if self._probe is not None and (self._probe.complete or self._nothing_to_choose(adapter_name, config)):
            measured, self._probe = self._probe, None
            if self._select(measured, adapter_name, config, optimizer):
                self._last = now

        interval = {"epoch": 1, "once": math.inf}.get(config.reselect, config.reselect)
        ahead = 0 if config.reselect == "epoch" else 1
        due = self.selection is None or now + ahead - self._last >= interval
        if self._probe is None and due:
            self._arm(optimizer)
        self._measured = None
        if self._probe is not None:
            self._passes_before = self._probe.passes
            self._measured = of_all_ranks(self._probe.state_dict())
        spent = config.spent or {"steps": 0, "full_steps": 0.0}
        config.spent = {"steps": spent["steps"] + 1, "full_steps": spent["full_steps"] + cost}

    def end(self) -> None:
        """Call off a probe that no further step will complete."""
        if self._probe is not None:
            self._probe.disarm()
            self._probe = None

    def _active_adapter(self) -> tuple[str, GreenTrainerConfig]:
        active = {name for layer in layers(self.model).values() for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(
                f"Selecting needs exactly one active adapter, and {sorted(active)} are active: call set_adapter with the "
                "one to train."
            )
        adapter_name = active.pop()
        config = self.model.peft_config[adapter_name]
        if config.inference_mode:
            raise ValueError(
                f"The adapter '{adapter_name}' was loaded for inference: load it with is_trainable=True to train it."
            )
        if config is not self._config:  # another adapter, or another training on the same base
            self.end()
            self.selection, self.graph, self.importances = None, None, {}
            self._config = config
        return adapter_name, config

    def _settle(self) -> None:
        """What was loaded or cast since the last pass is as it will be trained, before anything is measured."""
        follow_layers(self.model)
        for layer in layers(self.model).values():
            layer.settle()

    def _keep_saving(self) -> None:
        if not can_save(self.model):  # in every step: hooks may be installed at any time
            self._warn_once(REENTRANT)

    def _cost_of_step(self) -> float:
        """What the step cost at most, in steps of full fine-tuning; before any selection that much."""
        share = 1.0 if self.selection is None else self.selection.ratio
        return share if self._probe is None else self._probe.price(share) + cost_of_updates(self.model)

    def _arm(self, optimizer: torch.optim.Optimizer) -> None:
        adapter_name, config = self._active_adapter()
        self._settle()
        refuse_sharded(self.model, optimizer)
        groups = group_of(optimizer, self.model)
        rates = {name: float(g.get("initial_lr", g["lr"]) or 0.0) for name, g in groups.items()}
        if not any(rates.values()):  # none given, or a warm-up that starts at zero; only proportions matter
            rates = dict.fromkeys(rates, 1.0)
        rule = update_rule(optimizer)
        if not is_known(optimizer):
            self._warn_once(
                f"Importance is that of the update which Adam would make; that of {type(unwrapped(optimizer)).__name__} is not known."
            )

        parameters = measured_parameters(self.model, adapter_name)
        if config.provisional:  # factors that may be gone are measured like those that do not exist yet
            parameters = {name: p for name, p in parameters.items() if candidate_of(name) == name}
        if config.low_rank:
            forms = forms_of(self.model, adapter_name)
            no_gradient = set(forms.frozen.values())
            parameters = {name: p for name, p in parameters.items() if name not in no_gradient}
            measure = CrossBatch(rule, rates, set(candidates(self.model, config)))
            extra = {"forms": forms, "batches": config.importance_batches + 1}
        else:
            measure, extra = SameBatch(rule, rates), {"batches": config.importance_batches}
        self._probe = Probe(
            self.model,
            parameters,
            measure=measure,
            batch_size=config.probe_batch_size,
            time_with=optimizer if config.budget == "seconds" else None,
            **extra,
        )
        self._probe.arm()
        self._passes_before = 0

    def _select(
        self, probe: Probe, adapter_name: str, config: GreenTrainerConfig, optimizer: torch.optim.Optimizer
    ) -> bool:
        probe.disarm()
        own = set(candidates(self.model, config))
        trained = {name for name in probe.trained() if candidate_of(name) not in own}
        graph, importances = probe.graph(own | trained), probe.importances()
        importances = mean_over_ranks(importances)
        if not all(map(math.isfinite, importances.values())):
            self._warn_once(
                "The loss or a gradient was not finite in a probe, so the selection stays as it was; the next step is "
                "a probe again. If this goes on, lower the learning rate or look for bad examples."
            )
            return False
        if not (everything_fits(graph, config.rho) or any(value > 0 for value in importances.values())):
            self._warn_once(
                "Every gradient was zero in a probe (equal rewards, say), so the selection stays as it was; the next step "
                "is a probe again. If this goes on, check that the loss has a gradient."
            )
            return False

        # Where two batches disagree, an importance is small, and what else is left of the budget may go there.
        least = min((value for value in importances.values() if value > 0), default=0.0)
        of_graph = {name: max(importances[name], least) for name in graph.tensors if name in importances}
        selection = from_first_rank(lambda: select(graph, of_graph, config.rho, always=trained))
        self.graph, self.importances, self.selection = graph, importances, selection
        _apply(self.model, adapter_name, selection.candidates & own, optimizer)
        return True

    def _nothing_to_choose(self, adapter_name: str, config: GreenTrainerConfig) -> bool:
        """Whether one pass was enough, since it tells that everything fits the budget."""
        if self._probe.passes == 0 or config.budget == "seconds":
            return False
        graph = self._probe.graph({*candidates(self.model, config), *self._probe.trained()})
        return from_first_rank(lambda: everything_fits(graph, config.rho))

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def measured_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Every parameter that full fine-tuning would train, by its name in the base model: values for base tensors; and the
    factors of low-rank updates."""
    found = {}
    for name, parameter in model.named_parameters():
        module, values, adapter_and_tensor = base_name(name).partition(VALUES)
        if values:
            adapter, _, tensor = adapter_and_tensor.rpartition(".")
            if adapter == adapter_name:
                found[f"{module}.{tensor}"] = parameter
        elif can_be_trained(parameter):
            name = base_name(name).replace(".base_layer.", ".").replace(f".modules_to_save.{adapter_name}.", ".")
            found.setdefault(name, parameter)
    return found


def _apply(model: nn.Module, adapter_name: str, selected: frozenset[str], optimizer: torch.optim.Optimizer) -> None:
    config = model.peft_config[adapter_name]
    groups = group_of(optimizer, model)
    before = _values(model, adapter_name)
    # What the provisional selection trained was a stand-in for the first steps: unless selected now, it is forgotten.
    kept = set() if config.provisional else config.tensors.keys()
    set_values(model, adapter_name, selected | kept)
    set_selection(model, adapter_name, selected)
    after = {id(value) for value in _values(model, adapter_name)}
    dropped = [value for value in before if id(value) not in after]
    keep_in_step(optimizer, model, groups, adapter_name, dropped)
    rebuild_reducers(model)
    update_averages(model)


def _values(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    of_layers = [layer.greentrainer_values for layer in layers(model).values()]
    return [value for of_layer in of_layers if adapter_name in of_layer for value in of_layer[adapter_name].values()]
