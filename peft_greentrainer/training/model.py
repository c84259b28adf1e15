"""GreenTrainerModel: the peft tuner together with its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapter.model import GreenTrainerTuner
from ..planning.selection import Selection
from .allocator import allocator_of
from .loading import follow_loading, stop_following
from .param_groups import GroupOf


class GreenTrainerModel(GreenTrainerTuner):
    """
    Trains, within a budget of FLOPs, the tensors that lower the loss most (https://arxiv.org/abs/2309.13192).

        >>> model = get_peft_model(base, GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
        >>> Trainer(model, args, train_dataset=train, callbacks=[GreenTrainerCallback()]).train()

    Until the first probe has measured anything, a provisional selection made from sizes alone is trained.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`GreenTrainerConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`GreenTrainerConfig`]): The configuration of the adapter.
    """

    def update_and_allocate(
        self,
        step: int,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        epoch: int | None = None,
        group_of: GroupOf | None = None,
    ) -> None:
        """
        Call this in every step, after `optimizer.step()` and before `optimizer.zero_grad()`. When a selection is due
        it makes the next step a probe, and after the probe it selects and keeps the optimizer's groups in step.

            >>> for step, batch in enumerate(loader):
            ...     model(**batch).loss.backward()
            ...     optimizer.step()
            ...     model.base_model.update_and_allocate(step, optimizer)
            ...     optimizer.zero_grad()

        Args:
            step (`int`): The number of the step that was just taken.
            optimizer (`torch.optim.Optimizer` or a list of them): The optimizers of this model. They stay the same
                objects; tensors of optimizers that are not handed over are not selected.
            epoch (`int`, *optional*): The number of the epoch; needed for `reselect="epoch"`.
            group_of (`Callable`, *optional*): Says which parameter group a tensor belongs to, where neither it nor its base
                tensor is in one: its name in the base model and the base tensor in, one of the `param_groups` out, or None
                to leave the tensor out.

        Raises:
            ValueError: `rho` under the floor; two active adapters; `reselect="epoch"` without `epoch`; no optimizer takes
                any candidate; `group_of` returns what is no group, or one that does not take the tensor.
        """
        allocator_of(self.model).update(step, optimizer, epoch, group_of)

    @property
    def selection(self) -> Selection | None:
        """The last selection that was made ([`Selection`]), or None before the first."""
        return allocator_of(self.model).selection

    def allocation_state_dict(self) -> dict[str, Any]:
        """
        What a loop that is resumed has to know beside the states of model and optimizer: the selection, the schedule, and
        what a probe that is not complete has measured. Call this after `update_and_allocate`; on several ranks it is the same
        on all of them.

            >>> checkpoint = {
            ...     "model": model.state_dict(),
            ...     "optimizer": optimizer.state_dict(),
            ...     "allocation": model.base_model.allocation_state_dict(),
            ... }
            >>> torch.save(checkpoint, "checkpoint.pt")

        Returns:
            `dict[str, Any]`: Numbers, strings, lists and dicts of them, as JSON has them; empty before the first step.
        """
        return allocator_of(self.model).state_dict()

    def resume_allocation(
        self,
        state: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        group_of: GroupOf | None = None,
    ) -> None:
        """
        Go on where a loop was stopped, as if it had not been. Without this the selection is that of the checkpoint too, and
        the next step is a probe.

            >>> checkpoint = torch.load("checkpoint.pt")
            >>> model.load_state_dict(checkpoint["model"])
            >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            >>> optimizer.load_state_dict(checkpoint["optimizer"])
            >>> model.base_model.resume_allocation(checkpoint["allocation"], optimizer)

        Args:
            state (`Mapping[str, Any]`): What `allocation_state_dict` gave. Nothing is done if it is empty.
            optimizer (`torch.optim.Optimizer` or a list of them): The optimizers of this model, with their states loaded.
            group_of (`Callable`, *optional*): As in `update_and_allocate`.

        Raises:
            ValueError: `state` is not what `allocation_state_dict` gave; two active adapters, or one that is loaded for inference; no
                optimizer takes any candidate.
        """
        if state and "selected" not in state:
            raise ValueError("resume_allocation takes what allocation_state_dict gave when the checkpoint was made.")
        if state:
            allocator_of(self.model).resume(state, optimizer, group_of)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        follow_loading(model)

    def _unload_and_optionally_merge(
        self, *args: Any, **kwargs: Any
    ) -> Any:  # peft annotates None, and returns a model
        stop_following(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)
