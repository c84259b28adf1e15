"""Probes and selects while a model is trained: joins schedule, probe, choice and what a selection changes.

    >>> allocator = allocator_of(base_model)
    >>> allocator.update(step, optimizer)             # after every step
    >>> allocator.selection.ratio                     # what a step costs now, over full fine-tuning
    0.4998

One allocator per base model, kept on it: `GreenTrainerModel.update_and_allocate` and `GreenTrainerCallback` use the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..adapter.candidates import candidates_of
from ..adapter.config import GreenTrainerConfig
from ..adapter.refusals import refuse_replaced
from ..adapter.save_and_load import follow_layers
from ..adapter.values import config_of, layers, selected_values, set_selection
from ..measuring.enclosing import enclosing_modules
from ..measuring.importance import is_known, unwrapped
from ..measuring.probe import Probe
from ..planning.graph import CostGraph
from ..planning.selection import Selection
from ..tensors.names import candidate_of, tensor_of
from .apply import apply_selection
from .choose import UninformativeProbe, choose, everything_is_chosen, selection_from_state, selection_state
from .gradient_checkpointing import REENTRANT, checkpointing, remove_input_hooks
from .low_rank_forms import cost_of_updates
from .new_probe import new_probe
from .optimizer_steps import OtherOptimizers, record_steps
from .parallel.ddp import rebuild_reducers, refuse_sharded
from .parallel.ranks import gather, own_part
from .param_groups import GroupOf, Optimizers, as_list
from .placement import OptimizerSetup, Placement, by_reason, find_placement
from .schedule import Schedule
from .unmoved import MovementWatch
from .unreached import Unreached
from .warn_once import WarnOnce


NOT_SEEN = (
    "A step was to be a probe, and no forward and backward pass of the model was seen in it that gives its parameters a "
    "gradient, so nothing was measured; the next step is a probe again. Compute the loss with gradients on, from a call of the "
    "model (of the model itself, with probe_batch_size), and call loss.backward() before update_and_allocate."
)


def allocator_of(model: nn.Module) -> Allocator:
    """The allocator of a base model that has GreenTrainer layers."""
    if "_greentrainer_allocator" not in vars(model):
        vars(model)["_greentrainer_allocator"] = Allocator(model)
    return cast(Allocator, vars(model)["_greentrainer_allocator"])


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
        self._last = 0  # what the schedule counts, when the last selection was made
        self._measured: list[dict[str, Any]] | None = None  # what each rank's probe has so far
        self._turns_before = 0
        self._unreached = Unreached()
        self._warn_once = WarnOnce()
        self._others = OtherOptimizers()
        self._left_out: frozenset[str] = frozenset()
        self._watch = MovementWatch()
        record_steps()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the model are not probed, and other optimizers train them.
        return self.__dict__ | {"_probe": None, "_others": OtherOptimizers(), "_watch": MovementWatch()}

    def begin(
        self, step: int, optimizer: Optimizers, epoch: int | None = None, group_of: GroupOf | None = None
    ) -> None:
        """Probe the very next step if nothing was selected yet; call it before the first step where that is possible."""
        adapter_name, config = self._active_adapter()
        setup = self._setup(optimizer, group_of)
        self._keep_saving()
        self._settle()
        set_selection(self.model, adapter_name, config.selected or (), config.provisional)
        rebuild_reducers(self.model)
        if self.selection is None and self._probe is None:
            self._arm(adapter_name, config, setup)
        self._last = Schedule.from_setting(config.reselect).count(step, epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed has to know, as JSON; nothing before the first step."""
        config = self._config
        if config is None:
            return {}
        return {
            "selected": config.selected,
            "provisional": config.provisional,
            "spent": config.spent,
            "selection": self.selection and selection_state(self.selection),
            "importances": self.importances,
            "last": self._last,
            "probe": self._measured,
            "unreached": self._unreached.state_dict(),
        }

    def resume(self, state: Mapping[str, Any], optimizer: Optimizers, group_of: GroupOf | None = None) -> None:
        """Go on where a run was stopped, with the values and the optimizer's state of its checkpoint loaded before."""
        adapter_name, config = self._active_adapter()
        setup = self._setup(optimizer, group_of)
        self.end()
        self._keep_saving()
        self._settle()
        set_selection(self.model, adapter_name, state["selected"], state["provisional"])
        config.spent = state["spent"]
        self.selection = state["selection"] and selection_from_state(state["selection"])
        self.importances = dict(state["importances"])
        self._last = state["last"]
        if "unreached" in state:  # of which earlier versions kept nothing
            self._unreached.load_state_dict(state["unreached"])
        if state["probe"] is not None:
            probe = self._arm(adapter_name, config, setup)
            probe.load_state_dict(own_part(state["probe"]))
            self._turns_before = probe.turns
        rebuild_reducers(self.model)

    def update(
        self, step: int, optimizer: Optimizers, epoch: int | None = None, group_of: GroupOf | None = None
    ) -> None:
        """Select if the step that was just taken completed a probe; make the next step a probe if one is due."""
        adapter_name, config = self._active_adapter()
        setup = self._setup(optimizer, group_of)
        self._warn_of_unmoved()
        self._keep_saving()
        cost = self._cost_of_step()
        schedule = Schedule.from_setting(config.reselect)
        reached = schedule.count(step, epoch)
        if self._probe is not None and self._end_probed_step(self._probe, adapter_name, config):
            probe, self._probe = self._probe, None
            if self._select(probe, adapter_name, config, setup):
                self._last = reached
        if self._probe is None and (self.selection is None or schedule.is_due(reached, self._last)):
            self._arm(adapter_name, config, setup)
        self._keep_measured()
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
        config = config_of(self.model, adapter_name)
        if config.inference_mode:
            raise ValueError(
                f"The adapter '{adapter_name}' was loaded for inference: load it with is_trainable=True to train it."
            )
        if config is not self._config:  # another adapter, or another training on the same base
            self.end()
            self.selection, self.graph, self.importances = None, None, {}
            self._config = config
        return adapter_name, config

    def _setup(self, optimizer: Optimizers, group_of: GroupOf | None) -> OptimizerSetup:
        optimizers = as_list(optimizer)
        return OptimizerSetup(optimizers, group_of, self._others.find(optimizers))

    def _settle(self) -> None:
        """What was loaded or cast since the last pass is as it will be trained, before anything is measured."""
        follow_layers(self.model)
        for layer in layers(self.model).values():
            layer.settle()

    def _keep_saving(self) -> None:
        """In every step, since hooks may be installed at any time."""
        kind = checkpointing(self.model)
        if kind == "reentrant":
            self._warn_once(REENTRANT)
        elif kind == "non-reentrant":
            remove_input_hooks(self.model)

    def _cost_of_step(self) -> float:
        """What the step cost at most, in steps of full fine-tuning; before any selection that much."""
        share = 1.0 if self.selection is None else self.selection.ratio
        return share if self._probe is None else self._probe.cost_of_step(share) + cost_of_updates(self.model)

    def _warn_of_unmoved(self) -> None:
        unmoved = self._watch.take_unmoved()
        if unmoved:
            self._warn_once(
                f"Selected tensors have a gradient and did not move in a step: {by_reason(unmoved)}. Their share of the "
                "budget is spent for nothing."
            )

    def _place(self, adapter_name: str, config: GreenTrainerConfig, setup: OptimizerSetup) -> Placement:
        """Find the group of each tensor, and name the candidates that have none."""
        placement = find_placement(setup, self.model, adapter_name)
        offered = candidates_of(self.model, adapter_name).names
        self._left_out = frozenset(name for name in offered if tensor_of(name) in placement.left_out)
        if len(self._left_out) == len(offered):
            raise ValueError(f"No candidate can be trained: {placement.why_left_out(self._left_out)}")
        if self._left_out and setup.group_of is None:
            self._warn_once(f"Some tensors are never selected: {placement.why_left_out(self._left_out)}")
        return placement

    def _arm(self, adapter_name: str, config: GreenTrainerConfig, setup: OptimizerSetup) -> Probe:
        """Make the next step a probe."""
        self._settle()
        for optimizer in setup.optimizers:
            refuse_sharded(self.model, optimizer)
        placement = self._place(adapter_name, config, setup)
        for optimizer in setup.optimizers:
            if not is_known(optimizer):
                self._warn_once(
                    "Importance is that of the update which Adam would make; that of "
                    f"{type(unwrapped(optimizer)).__name__} is not known."
                )
        holders = enclosing_modules(self.model, nn.Module)  # a look at all objects of the process
        self._probe = new_probe(self.model, adapter_name, config, setup, placement, holders)
        self._probe.arm(holders)
        self._turns_before = 0
        return self._probe

    def _end_probed_step(self, probe: Probe, adapter_name: str, config: GreenTrainerConfig) -> bool:
        """Whether the probe has measured enough to select; if not, the next step is a probe too."""
        probe.end_turn()
        if probe.turns == self._turns_before:
            self._warn_once(NOT_SEEN)
        own = set(candidates_of(self.model, adapter_name).names)
        if not all(gather(probe.complete)):
            offered = (own | set(probe.trained())) - self._left_out
            if config.unit == "seconds" or not everything_is_chosen(probe, offered, config.rho):
                return False
        if not self._unreached.count_probed_step(probe, own, config.provisional):
            return True
        refuse_replaced(own, layers(self.model))  # which would be waited for in vain
        probe.go_on()  # with what it has measured
        warning = self._unreached.take_warning()
        if warning is not None:
            self._warn_once(warning)
        return False

    def _select(self, probe: Probe, adapter_name: str, config: GreenTrainerConfig, setup: OptimizerSetup) -> bool:
        """Train what the probe tells to train; whether it told anything."""
        probe.disarm()
        own = set(candidates_of(self.model, adapter_name).names)
        always = {name for name in probe.trained() if candidate_of(name) not in own}
        placement = self._place(adapter_name, config, setup)  # groups may have changed since the probe began
        own -= self._left_out
        try:
            choice = choose(probe, own, always, config.rho)
        except UninformativeProbe as why:
            self._warn_once(str(why))
            return False
        self.selection, self.graph, self.importances = choice.selection, choice.graph, choice.importances
        selected = self.selection.candidates & own
        apply_selection(self.model, adapter_name, selected, setup.optimizers, placement)
        values = selected_values(self.model, adapter_name)
        tensors = {name: tensor_of(name) for name in values}
        self._watch.follow(
            values,
            {name: placement.optimizers[tensor] for name, tensor in tensors.items()},
            {name: placement.groups[tensor] for name, tensor in tensors.items()},
        )
        return True

    def _keep_measured(self) -> None:
        """Keep what every rank has measured, for a checkpoint that one of them writes."""
        self._measured = None
        if self._probe is not None:
            self._turns_before = self._probe.turns
            self._measured = gather(self._probe.state_dict())
