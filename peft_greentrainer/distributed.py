"""Several processes: every rank selects the same tensors, and DistributedDataParallel synchronizes what was selected.

>>> importances = mean_over_ranks(importances)
>>> selection = from_first_rank(lambda: select(graph, importances, rho=0.5))
>>> rebuild_reducers(model)                       # after the set of trained tensors has changed

Without `torch.distributed` all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .around import around


T = TypeVar("T")


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean over all ranks of each value; where a rank has none (an expert that it did not use), it counts as zero."""
    if not _several():
        return values
    of_ranks = of_all_ranks(values)
    names = list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank))
    return {name: sum(of_rank.get(name, 0.0) for of_rank in of_ranks) / len(of_ranks) for name in names}


def of_all_ranks(value: T) -> list[T]:
    """The values of every rank, in order."""
    values = [value] * (dist.get_world_size() if _several() else 1)
    if _several():
        dist.all_gather_object(values, value)
    return values


def of_this_rank(values: list[T]) -> T:
    """The one of this rank; the first, where there are not so many."""
    rank = dist.get_rank() if _several() else 0
    return values[rank if rank < len(values) else 0]


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` gives, or the `ValueError` that it raises, on rank 0: batches differ, and with them cost graphs."""
    if not _several():
        return make()
    made: list[T | ValueError | None] = [None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except ValueError as error:
            made[0] = error
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], ValueError):
        raise made[0]
    return made[0]


def rebuild_reducers(model: nn.Module) -> None:
    """Let every `DistributedDataParallel` around `model` reduce the gradients of what requires grad now, and no other.

    It looks at the parameters once, when it is made: those that are unfrozen later get other gradients on each rank, and
    for those that are frozen it waits in vain.
    """
    if not _several():
        return
    for ddp in around(model, DistributedDataParallel):
        training, hooks = ddp.training, ddp._comm_hooks
        ddp.__init__(
            ddp.module,
            device_ids=ddp.device_ids,
            output_device=ddp.output_device,
            dim=ddp.dim,
            broadcast_buffers=ddp.broadcast_buffers,
            process_group=ddp.process_group,
            bucket_cap_mb=ddp.bucket_bytes_cap / 2**20,
            find_unused_parameters=ddp.find_unused_parameters,
            gradient_as_bucket_view=ddp.gradient_as_bucket_view,
            static_graph=ddp.static_graph,
        )
        ddp.training = training
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)


def refuse_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` if parameters are sharded: values that are made later would be trained on no rank, or apart."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    sharded = any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
    of_deepspeed = "deepspeed" in f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
    if sharded or of_deepspeed or around(model, FullyShardedDataParallel):
        raise ValueError(
            "GreenTrainer does not train under FSDP or DeepSpeed ZeRO, which shard the parameters once, at the start. Use "
            "DistributedDataParallel: a budgeted step keeps gradients and moments of the selected tensors only."
        )


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
