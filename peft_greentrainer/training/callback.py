"""GreenTrainerCallback: probes and selects while `transformers.Trainer` trains.

>>> Trainer(model, args, train_dataset=train, callbacks=[GreenTrainerCallback()]).train()
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..adapter.config import GreenTrainerConfig
from ..adapter.layer import GreenTrainerLayer
from ..tensors.names import base_name
from .allocator import allocator_of
from .param_groups import GroupOf


class GreenTrainerCallback(TrainerCallback, ExportableState):
    """
    Makes the first step a probe, selects after it, and again whenever the adapter's config says so.

    The model must be a [`PeftModel`] with a [`GreenTrainerConfig`], or a transformers model to which such a config was
    added, or a module that holds one of them. Raises `ValueError` where there is none, or several.

    Args:
        group_of (`Callable`, *optional*): Says which parameter group of the optimizer a tensor belongs to, where neither it
            nor its base tensor is in one: its name in the base model and the base tensor in, one of the `param_groups` out,
            or None to leave the tensor out.
    """

    def __init__(self, group_of: GroupOf | None = None) -> None:
        self.group_of = group_of

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._allocator = allocator_of(base_model(model))
        # transformers wants to find this callback in a checkpoint that was made without it, too.
        kept = cast(dict[str, Any], state.stateful_callbacks)  # annotated as what the constructor takes
        saved = kept.setdefault(type(self).__name__, self.state())
        saved = saved[-1] if isinstance(saved, list) else saved  # of a callback that was added twice
        self._allocator.steps_seen = state.global_step
        if state.global_step and saved["attributes"]["allocation"]:
            self._allocator.resume(saved["attributes"]["allocation"], optimizer, self.group_of)
        else:
            self._allocator.begin(state.global_step, optimizer, int(state.epoch or 0), self.group_of)

    def state(self) -> dict[str, Any]:
        """What transformers saves with a checkpoint."""
        allocator = getattr(self, "_allocator", None)
        return {"args": {}, "attributes": {"allocation": allocator and allocator.state_dict()}}

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        allocator_of(base_model(model)).end_micro_batch()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        allocator = allocator_of(base_model(model))
        if allocator.steps_seen != state.global_step:  # or this callback was added twice
            allocator.steps_seen = state.global_step
            allocator.update(state.global_step, optimizer, epoch=int(state.epoch), group_of=self.group_of)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        allocator = allocator_of(base_model(model))
        allocator.end()
        if allocator.selection is None:
            warnings.warn(
                "Training ended and no selection was ever made: no probe saw a finite loss. What was trained was chosen "
                "from sizes alone. Train for more steps, or look at the loss of the first batches."
            )


def base_model(model: nn.Module) -> nn.Module:
    """The model that carries the GreenTrainer layers: inside a `PeftModel`, or at any depth of what is trained."""
    names: dict[
        nn.Module, str
    ] = {}  # of base models; that of the PeftModel around one is the name that its owner knows
    for name, module in model.named_modules():
        names.setdefault(module.get_base_model() if isinstance(module, PeftModel) else module, name)
    found = {base_name(name): module for module, name in names.items() if _is_adapted(module)}
    if not found:
        raise ValueError(
            "GreenTrainerCallback found no GreenTrainer adapter in the model: wrap it first, "
            "get_peft_model(model, GreenTrainerConfig(rho=0.5))."
        )
    trained = [module for module in found.values() if any(p.requires_grad for p in module.parameters())]
    if len(found) > 1 and len(trained) != 1:
        raise ValueError(
            f"Several parts of the model have a GreenTrainer adapter: {', '.join(name or 'the whole' for name in found)}. A "
            "budget is that of one base model: wrap the model that contains them, get_peft_model(model, "
            "GreenTrainerConfig(rho=0.5)), with target_modules or exclude_modules for what may be trained; or freeze all "
            "but one of them, requires_grad_(False)."
        )
    return trained[0] if trained else next(iter(found.values()))


def _is_adapted(module: nn.Module) -> bool:
    configs = vars(module).get("peft_config")  # a PeftModel and its tuner forward what they do not have themselves
    return (
        isinstance(configs, Mapping)
        and not isinstance(module, (PeftModel, BaseTuner))
        and any(isinstance(config, GreenTrainerConfig) for config in configs.values())
        and any(isinstance(layer, GreenTrainerLayer) for layer in module.modules())  # not unloaded
    )
