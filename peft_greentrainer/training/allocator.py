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
import weakref
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..adapter.config import GreenTrainerConfig
from ..adapter.refusals import refuse_replaced
from ..adapter.save_and_load import follow_layers
from ..adapter.values import (
    candidates,
    layers,
    parameters_in_use,
    selected_values,
    set_selection,
    set_values,
)
from ..measuring.importance import is_known, unwrapped, update_rule
from ..measuring.measure import CrossBatch, SameBatch
from ..measuring.outside import outer_parameters
from ..measuring.probe import Probe
from ..planning.graph import CostGraph
from ..planning.selection import Selection, everything_fits, select
from ..tensors.names import OUTSIDE, candidate_of, tensor_of
from .averaging import update_averages
from .gradient_checkpointing import REENTRANT, can_save
from .low_rank_forms import cost_of_updates, forms_of
from .movement import Watch
from .parallel.ddp import rebuild_reducers, refuse_sharded
from .parallel.ranks import from_first_rank, mean_over_ranks, of_all_ranks, of_this_rank
from .param_groups import GroupOf, Optimizers, Placement, TrainedBy, by_reason, keep_in_step, list_of
from .stepping import note_steps, now, stepped_since
from .unreached import PATIENCE, Unreached


NOT_SEEN = (
    "A step was to be a probe, and no forward and backward pass of the model was seen in it that gives its parameters a "
    "gradient, so nothing was measured; the next step is a probe again. Compute the loss with gradients on, from a call of the "
    "model (of the model itself, with probe_batch_size), and call loss.backward() before update_and_allocate."
)


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
        self._turns_before = 0
        self._unreached = Unreached()
        self._warned: set[str] = set()
        self._optimizers: Set[torch.optim.Optimizer] = weakref.WeakSet()
        self._began = now()  # training, with these optimizers
        self._left_out: frozenset[str] = frozenset()
        self._watch = Watch()
        self._looked = now()  # at what moves
        note_steps()

    def __getstate__(self) -> dict:
        # Copies of the model are not probed, and other optimizers train them.
        return self.__dict__ | {"_probe": None, "_optimizers": frozenset(), "_watch": Watch()}

    def begin(self, step: int, optimizer: Optimizers, group_of: GroupOf | None = None) -> None:
        """Probe the very next step if nothing was selected yet; call it before the first step where that is possible."""
        adapter_name, config = self._active_adapter()
        trained_by = self._trained_by(optimizer, group_of)
        self._keep_saving()
        self._settle()
        set_selection(self.model, adapter_name, config.selected, config.provisional)
        rebuild_reducers(self.model)
        if self.selection is None and self._probe is None:
            self._arm(trained_by)
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
            "unreached": self._unreached.state_dict(),
        }

    def resume(self, state: Mapping[str, Any], optimizer: Optimizers, group_of: GroupOf | None = None) -> None:
        """Go on where a run was stopped, with the values and the optimizer's state of its checkpoint loaded before."""
        adapter_name, config = self._active_adapter()
        trained_by = self._trained_by(optimizer, group_of)
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
        if "unreached" in state:  # of which earlier versions kept nothing
            self._unreached.load_state_dict(state["unreached"])
        if state["probe"] is not None:
            self._arm(trained_by)
            self._probe.load_state_dict(of_this_rank(state["probe"]))
            self._turns_before = self._probe.turns
        rebuild_reducers(self.model)

    def update(
        self, step: int, optimizer: Optimizers, epoch: int | None = None, group_of: GroupOf | None = None
    ) -> None:
        """Select if the step that was just taken completed a probe; make the next step a probe if one is due."""
        adapter_name, config = self._active_adapter()
        trained_by = self._trained_by(optimizer, group_of)
        self._look()
        self._keep_saving()
        cost = self._cost_of_step()
        now = step
        if config.reselect == "epoch":
            if epoch is None:
                raise ValueError(
                    "reselect='epoch' has to know the epoch: call update_and_allocate(step, optimizer, epoch=epoch), or "
                    "set reselect to a number of steps."
                )
            now = epoch

        if self._probe is not None:
            self._probe.end_turn()
            if self._probe.turns == self._turns_before:
                self._warn_once(NOT_SEEN)
            enough = all(of_all_ranks(self._probe.complete)) or self._nothing_to_choose(adapter_name, config)
            if enough and not self._waits_for_unreached(adapter_name, config):
                measured, self._probe = self._probe, None
                if self._select(measured, adapter_name, config, trained_by):
                    self._last = now

        interval = {"epoch": 1, "once": math.inf}.get(config.reselect, config.reselect)
        ahead = 0 if config.reselect == "epoch" else 1
        due = self.selection is None or now + ahead - self._last >= interval
        if self._probe is None and due:
            self._arm(trained_by)
        self._measured = None
        if self._probe is not None:
            self._turns_before = self._probe.turns
            self._measured = of_all_ranks(self._probe.state_dict())
        spent = config.spent or {"steps": 0, "full_steps": 0.0}
        config.spent = {"steps": spent["steps"] + 1, "full_steps": spent["full_steps"] + cost}

    def end_micro_batch(self) -> None:
        """Call it between the micro-batches of a step where these are known: costs are then those of one of them."""
        if self._probe is not None:
            self._probe.end_turn()

    def end(self) -> None:
        """Call off a probe that no further step will complete, and follow no tensor any longer."""
        if self._probe is not None:
            self._probe.disarm()
            self._probe = None
        self._watch.end()

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

    def _trained_by(self, optimizer: Optimizers, group_of: GroupOf | None) -> TrainedBy:
        optimizers = list_of(optimizer)
        if set(optimizers) != set(self._optimizers):  # another training: who took steps before has no part in it
            self._optimizers, self._began = weakref.WeakSet(optimizers), now()
        own = [unwrapped(optimizer).param_groups for optimizer in optimizers]
        stepped = stepped_since(self._began)
        elsewhere = [other for other in stepped if not any(other.param_groups is groups for groups in own)]
        return TrainedBy(optimizers, group_of, elsewhere)

    def _look(self) -> None:
        """Tell of tensors that have a gradient and did not move in the step that was just taken."""
        still = self._watch.look(stepped_since(self._looked))
        self._looked = now()
        if still:
            self._warn_once(
                f"Selected tensors have a gradient and did not move in a step: {by_reason(still)}. Their share of the budget "
                "is spent for nothing."
            )

    def _place(self, adapter_name: str, config: GreenTrainerConfig, trained_by: TrainedBy) -> Placement:
        """Find the group of each tensor, and name the candidates that have none."""
        placed = Placement.of(trained_by, self.model, adapter_name)
        offered = candidates(self.model, config)
        self._left_out = frozenset(name for name in offered if tensor_of(name) in placed.left_out)
        if len(self._left_out) == len(offered):
            raise ValueError(f"No candidate can be trained: {placed.why_left_out(self._left_out)}")
        if self._left_out and trained_by.group_of is None:
            self._warn_once(f"Some tensors are never selected: {placed.why_left_out(self._left_out)}")
        return placed

    def _arm(self, trained_by: TrainedBy) -> None:
        adapter_name, config = self._active_adapter()
        self._settle()
        for optimizer in trained_by.optimizers:
            refuse_sharded(self.model, optimizer)
        placed = self._place(adapter_name, config, trained_by)
        rates = {name: float(g.get("initial_lr", g["lr"]) or 0.0) for name, g in placed.groups.items()}
        if not any(rates.values()):  # none given, or a warm-up that starts at zero; only proportions matter
            rates = dict.fromkeys(rates, 1.0)
        rules = {name: update_rule(optimizer) for name, optimizer in placed.optimizers.items()}
        rule = update_rule(trained_by.optimizers[0])
        for optimizer in trained_by.optimizers:
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
            measure = CrossBatch(rule, rates, set(candidates(self.model, config)), rules)
            extra = {"forms": forms, "batches": config.importance_batches + 1}
        else:
            measure, extra = SameBatch(rule, rates, rules), {"batches": config.importance_batches}
        self._probe = Probe(
            self.model,
            parameters,
            measure=measure,
            batch_size=config.probe_batch_size,
            time_with=trained_by.optimizers[0] if config.unit == "seconds" else None,
            **extra,
        )
        self._probe.arm()
        self._turns_before = 0

    def _select(self, probe: Probe, adapter_name: str, config: GreenTrainerConfig, trained_by: TrainedBy) -> bool:
        probe.disarm()
        own = set(candidates(self.model, config))
        trained = {name for name in probe.trained() if candidate_of(name) not in own}
        placed = self._place(adapter_name, config, trained_by)  # groups may have changed since the probe began
        own -= self._left_out
        importances = mean_over_ranks(probe.importances())
        if not all(map(math.isfinite, importances.values())):
            self._warn_once(
                "The loss or a gradient was not finite in a probe, so the selection stays as it was; the next step is "
                "a probe again. If this goes on, lower the learning rate or look for bad examples."
            )
            return False

        def choose() -> tuple[CostGraph, Selection] | None:
            graph = probe.graph(own | trained)
            # Where two batches disagree, an importance is small, and what else is left of the budget may go there.
            least = min((value for value in importances.values() if value > 0), default=0.0)
            if not (everything_fits(graph, config.rho) or least):
                return None
            of_graph = {name: max(importances[name], least) for name in graph.tensors if name in importances}
            # What is always trained and never got a gradient costs nothing in batches like these.
            return graph, select(graph, of_graph, config.rho, always=trained.intersection(graph.tensors))

        chosen = from_first_rank(choose)
        if chosen is None:
            self._warn_once(
                "Every gradient was zero in a probe (equal rewards, say), so the selection stays as it was; the next step "
                "is a probe again. If this goes on, check that the loss has a gradient."
            )
            return False
        self.importances = importances
        self.graph, self.selection = chosen
        _apply(self.model, adapter_name, self.selection.candidates & own, trained_by.optimizers, placed)
        selected = selected_values(self.model, adapter_name)
        of_tensor = {name: tensor_of(name) for name in selected}
        self._watch.follow(
            selected,
            {name: placed.optimizers[tensor] for name, tensor in of_tensor.items()},
            {name: placed.groups[tensor] for name, tensor in of_tensor.items()},
        )
        return True

    def _waits_for_unreached(self, adapter_name: str, config: GreenTrainerConfig) -> bool:
        """Whether the probe goes on, since what it was to tell of got no gradient; what it has measured stays."""
        own, trained = set(candidates(self.model, config)), set(self._probe.trained())
        # A model around the base may be of an earlier training, and is not waited for.
        always = {name for name in trained if candidate_of(name) not in own and not name.startswith(OUTSIDE)}
        # A provisional selection is made from sizes, and may have tensors that never get a gradient.
        selected = set() if config.provisional else {candidate_of(name) for name in trained} & own
        reached = self._probe.reached() & (own | always)
        if not self._unreached.waits(always | selected, reached, reaches_any=bool(reached & own)):
            return False
        refuse_replaced(own, layers(self.model))  # which would be waited for in vain
        self._probe.go_on()
        missing = [name for name in self._unreached.missing if name not in self._warned]
        self._warned.update(missing)
        if missing:
            self._warn_once(
                f"A probe saw no gradient of {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, so the cost of "
                "training that is not known. The selection stays as it was, and the next step is a probe too, up to "
                f"{PATIENCE} in a row; then what was seen is selected from."
            )
        elif not self._unreached.missing:
            self._warn_once(
                "The loss of a probe reached no candidate tensor, so the selection stays as it was; the next step is a probe "
                "too. If this goes on, check that the loss depends on what target_modules names."
            )
        return True

    def _nothing_to_choose(self, adapter_name: str, config: GreenTrainerConfig) -> bool:
        """Whether one pass was enough, since it tells that everything fits the budget."""

        def fits() -> bool:
            offered = {*candidates(self.model, config), *self._probe.trained()} - self._left_out
            return not self._probe.reached().isdisjoint(offered) and everything_fits(
                self._probe.graph(offered), config.rho
            )

        return config.unit != "seconds" and from_first_rank(fits)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def measured_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Every parameter that full fine-tuning would train, by its name in the base model: values for base tensors; the
    factors of low-rank updates; and what a model around the base trains."""
    return outer_parameters(model) | parameters_in_use(model, adapter_name)


def _apply(
    model: nn.Module,
    adapter_name: str,
    selected: frozenset[str],
    optimizers: Sequence[torch.optim.Optimizer],
    placed: Placement,
) -> None:
    config = model.peft_config[adapter_name]
    before = _values(model, adapter_name)
    # What the provisional selection trained was a stand-in for the first steps: unless selected now, it is forgotten.
    kept = set() if config.provisional else config.tensors.keys()
    set_values(model, adapter_name, selected | kept)
    set_selection(model, adapter_name, selected)
    after = {id(value) for value in _values(model, adapter_name)}
    dropped = [value for value in before if id(value) not in after]
    keep_in_step(optimizers, model, placed.groups, adapter_name, dropped)
    rebuild_reducers(model)
    update_averages(model)


def _values(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    of_layers = [layer.greentrainer_values for layer in layers(model).values()]
    return [value for of_layer in of_layers if adapter_name in of_layer for value in of_layer[adapter_name].values()]
