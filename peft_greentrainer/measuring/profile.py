"""Profiles a model: one forward and backward pass, recorded, tells what training any set of its tensors costs.

>>> graph = profile(model, batch)
>>> graph.flops(graph.tensors) == graph.full_flops
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..planning.graph import CostGraph
from ..tensors.forms import has_low_rank_form
from ..tensors.names import low_rank_form
from ..tensors.trainable import can_be_trained
from .low_rank import LowRankForms
from .passes import loss_of, record
from .recorder import CostRecorder
from .seconds import timed


def profile(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    candidates: Iterable[str] | None = None,
    r: int | None = None,
    unit: Literal["flops", "seconds"] = "flops",
    optimizer: torch.optim.Optimizer | None = None,
) -> CostGraph:
    """Record one forward and backward pass of `model` on `batch` and return its cost graph.

        >>> graph = profile(model, {"input_ids": ids, "labels": ids})        # ids: (batch, tokens)
        >>> graph = profile(net, images, loss_fn=lambda output, batch: F.cross_entropy(output, labels))

    Args:
        model: any module. On the `meta` device nothing is computed. It is left as it was: parameters, gradients,
            `requires_grad`, buffers and the random state.
        batch: keyword arguments of the model as a mapping, positional ones as a tuple, or a single tensor.
        loss_fn: `loss_fn(output, batch)` gives the scalar loss, where the model's output has no `.loss`.
        candidates: names of parameters that may be selected; default: every floating-point parameter. The others
            still count in the cost of full fine-tuning.
        r: offer every weight of a linear module (`nn.Linear`, and `Conv1D` of transformers) as a low-rank update of this rank too, as the candidate
            `low_rank_form(name)`; None: whole tensors only. Not in seconds.
        unit: "flops", or "seconds" to time every operation, in a few passes; see `peft_greentrainer.measuring.seconds`.
        optimizer: for seconds, the optimizer whose pass over each trained tensor is added; default: `torch.optim.AdamW`.

    Raises:
        ValueError: if the batch gives no loss, or seconds are asked for on the `meta` device or of low-rank forms.
    """
    parameters = {name: p for name, p in model.named_parameters() if can_be_trained(p)}
    linear = {
        low_rank_form(f"{key}.weight"): module
        for key, module in model.named_modules()
        if has_low_rank_form(module) and f"{key}.weight" in parameters
    }

    def loss() -> Tensor:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple) else model(batch)
        return loss_fn(output, batch) if loss_fn is not None else loss_of(output)

    if unit == "seconds":
        if r is not None:
            raise ValueError("What a low-rank form would take is known in FLOPs only: use unit='flops'.")
        operations = timed(model, loss, parameters, optimizer)
    elif unit == "flops":
        recorder = CostRecorder()
        forms = LowRankForms() if r is None else LowRankForms(r, linear)
        operations = recorder.operations
        record(recorder, model, loss, parameters, operations.mark, forms)
    else:
        raise ValueError(f"unit must be 'flops' or 'seconds'; got {unit!r}.")
    return operations.graph([*parameters, *linear] if candidates is None else candidates)
