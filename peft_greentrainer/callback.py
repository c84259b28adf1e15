"""GreenTrainerCallback: probes and selects while `transformers.Trainer` trains.

>>> Trainer(model, args, train_dataset=train, callbacks=[GreenTrainerCallback()]).train()
"""

from __future__ import annotations

import warnings

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .allocation import allocator_of
from .layer import GreenTrainerLayer


class GreenTrainerCallback(TrainerCallback, ExportableState):
    """
    Makes the first step a probe, selects after it, and again whenever the adapter's config says so.

    The model must be a [`PeftModel`] with a [`GreenTrainerConfig`], or a transformers model to which such a config was
    added. Raises `ValueError` where it is neither.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ) -> None:
        self._allocator = allocator_of(base_model(model))
        # transformers wants to find this callback in a checkpoint that was made without it, too.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        saved = saved[-1] if isinstance(saved, list) else saved  # of a callback that was added twice
        self._allocator.steps_seen = state.global_step
        if state.global_step and saved["attributes"]["allocation"]:
            self._allocator.resume(saved["attributes"]["allocation"], optimizer)
        else:
            self._allocator.begin(state.global_step, optimizer)

    def state(self) -> dict:
        """What transformers saves with a checkpoint."""
        allocator = getattr(self, "_allocator", None)
        return {"args": {}, "attributes": {"allocation": allocator and allocator.state_dict()}}

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        allocator_of(base_model(model)).end_micro_batch()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ) -> None:
        allocator = allocator_of(base_model(model))
        if allocator.steps_seen != state.global_step:  # or this callback was added twice
            allocator.steps_seen = state.global_step
            allocator.update(state.global_step, optimizer, epoch=int(state.epoch))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        allocator = allocator_of(base_model(model))
        allocator.end()
        if allocator.selection is None:
            warnings.warn(
                "Training ended and no selection was ever made: no probe saw a finite loss. What was trained was chosen "
                "from sizes alone. Train for more steps, or look at the loss of the first batches."
            )


def base_model(model: nn.Module) -> nn.Module:
    """The model that carries the GreenTrainer layers, out of a `PeftModel` if need be."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not any(isinstance(module, GreenTrainerLayer) for module in base.modules()):
        raise ValueError(
            "GreenTrainerCallback found no GreenTrainer adapter in the model: wrap it first, "
            "get_peft_model(model, GreenTrainerConfig(rho=0.5))."
        )
    return base
