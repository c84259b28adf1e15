"""DistributedDataParallel reduces what is trained now; FSDP and DeepSpeed ZeRO are refused.

>>> rebuild_reducers(model)                       # after the set of trained tensors has changed
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...measuring.enclosing import enclosing_modules
from .ranks import are_several


def rebuild_reducers(model: nn.Module) -> None:
    """Let every `DistributedDataParallel` around `model` reduce the gradients of what requires grad now, and no other.

    It looks at the parameters once, when it is made: those that are unfrozen later get other gradients on each rank, and
    for those that are frozen it waits in vain.
    """
    if not are_several():
        return
    for ddp in enclosing_modules(model, DistributedDataParallel):
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
    if sharded or of_deepspeed or enclosing_modules(model, FullyShardedDataParallel):
        raise ValueError(
            "GreenTrainer does not train under FSDP or DeepSpeed ZeRO, which shard the parameters once, at the start. Use "
            "DistributedDataParallel: a budgeted step keeps gradients and moments of the selected tensors only."
        )
