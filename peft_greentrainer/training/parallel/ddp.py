"""DistributedDataParallel reduces what is trained now; FSDP and DeepSpeed ZeRO are refused.

    >>> rebuild_reducers(model)                       # after the set of trained tensors has changed

Nothing is broadcast then, since every rank has the same tensors already. `DistributedDataParallel` sent what existed when it
was made, or the user said that it need not (`init_sync=False`). Every rank selects the same tensors (see `ranks.py`). A new
value is a copy of its base tensor, which training does not change; the first factor of a low-rank update is drawn from a seed
that its name gives, and the second one is zero. And what was trained before moved by gradients that were reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _setup_mixed_precision_params

from ...adapter.values import layers
from ...measuring.enclosing import enclosing_modules


def rebuild_reducers(model: nn.Module) -> None:
    """Let every `DistributedDataParallel` around `model` reduce the gradients of what requires grad now, and no other.

    It looks at the parameters once, when it is made: those that are unfrozen later get other gradients on each rank, and
    for those that are frozen it waits in vain.

    Raises:
        ValueError: `delay_all_reduce_named_params` names values of the adapter.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for ddp in enclosing_modules(model, DistributedDataParallel):
        if "reducer" in vars(ddp):  # one that failed while it was made has none, and lives as long as its traceback
            _refuse_delayed(model, ddp)
            _rebuild_reducer(ddp)


def _rebuild_reducer(ddp: Any) -> None:
    """Give the wrapper another reducer, as torch (2.6 to 2.13) does when a pickled one is loaded (`__setstate__`).

    The wrapper itself stays as it was made: its settings, hooks and join context are its attributes, and `__init__`, which
    would set them anew and broadcast the whole model, is not called again. What the old reducer alone was told is told to
    the new one here.
    """
    hook_name = ddp._get_ddp_logging_data().get("comm_hook")
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    ddp._remove_autograd_hooks()  # of the old reducer, whoever else keeps it
    ddp._module_parameters = [p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore]
    parameters, expect_sparse_gradient = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse_gradient, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    kinds = dist.BuiltinCommHookType.__members__  # type: ignore[attr-defined]  # torch does not list it in __all__
    for builtin in kinds.values():  # of which the wrapper keeps nothing
        if str(builtin) == hook_name:
            ddp._register_builtin_comm_hook(builtin)
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    if ddp.mixed_precision is not None:
        _setup_mixed_precision_params(ddp.mixed_precision, ddp.module)
        ddp.reducer._set_mixed_precision_param_dtype(ddp.mixed_precision.param_dtype)
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp._module_parameters):
        ddp.reducer._set_optimizer_in_backward()
    if ddp._use_python_reducer:
        for handle in ddp._accum_grad_hooks:
            handle.remove()
        ddp._accum_grad_hooks.clear()
        ddp._register_accum_grad_hook()


def _refuse_delayed(model: nn.Module, ddp: Any) -> None:
    values = {id(p) for layer in layers(model).values() for p in layer.greentrainer_values.parameters()}
    if any(id(p) in values for p in ddp._delay_all_reduce_params):
        raise ValueError(
            "delay_all_reduce_named_params names values of the GreenTrainer adapter, and which of them are trained changes: "
            "leave them out of it, so that DistributedDataParallel reduces them as ever."
        )


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
