"""What is trained until the first probe has measured anything: chosen from sizes alone.

    >>> found = find_tensors(base)
    >>> provisional_selection(base, found, candidates=Candidates.of(found, config).names, config=config)[0]
    'model.layers.24.mlp.up_proj.weight'

A selection starts at the loss, since nothing can be trained without the activation gradients that lead to it: these are the
last candidates of the model, as many as `rho` pays for. The cost graph is exact, and needs a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from ..tensors.names import is_low_rank, tensor_of
from .config import GreenTrainerConfig
from .layer import base_layer_of
from .model_tensors import ModelTensors, named_modules
from .values import config_of, layers_with


def provisional_selection(
    model: nn.Module, found: ModelTensors, candidates: Iterable[str], config: GreenTrainerConfig
) -> list[str]:
    """The last of these candidates whose training costs about `rho`, going by sizes.

    A use of a tensor costs its size in the forward pass, again where activation gradients pass it, and again for its own
    gradient. Factors cost theirs three times, and looking something up costs nothing.

    Args:
        model: the base model.
        found: all of its tensors, whose uses cost something whether they are candidates or not.
        candidates: what may be selected, in order.
        config: says what `rho` and the rank are.
    """
    form_of = {tensor_of(candidate): candidate for candidate in candidates}  # the low-rank form, where there is one
    modules = named_modules(model)
    order = {key: i for i, key in enumerate(modules)}
    all_uses = sorted(
        ((use, tensor.name) for tensor in found.tensors for use in tensor.uses), key=lambda use: order[use[0].module]
    )
    passed, own_cost = [], dict.fromkeys((tensor.name for tensor in found.tensors), 0)
    for use, tensor in all_uses:
        module = base_layer_of(modules[use.module])
        shape = getattr(module, use.name).shape
        size = 0 if isinstance(module, nn.Embedding) else shape.numel()
        low_rank = is_low_rank(form_of.get(tensor, tensor))
        own_cost[tensor] += 3 * config.form.rank * sum(shape) if low_rank else size
        passed.append((tensor, size, tensor == use.full_name))

    room = (3 * config.rho - 1) * sum(size for _, size, _ in passed)
    selected: list[str] = []
    for tensor, size, is_owner in reversed(passed):
        room -= size
        if is_owner and tensor in form_of:
            room -= own_cost[tensor]
            if room < 0 and selected:
                break
            selected.insert(0, form_of[tensor])
    return selected


def warn_if_never_selected(model: nn.Module, adapter_name: str) -> None:
    """Warn if an adapter was trained and what it trained was never selected: nobody has called for that."""
    config = config_of(model, adapter_name)
    if not (config.provisional and config.init_weights) or config.spent:  # it is being selected
        return
    moved = any(
        not layer.base_tensor(tensor).is_meta and layer.get_delta_weight(adapter_name, tensor).any()
        for layer in layers_with(model, adapter_name).values()
        if not layer.merged
        for tensor in layer.changed_tensors(adapter_name)
    )
    if moved:
        warnings.warn(
            "This adapter was trained, but no selection was ever made: what was trained was chosen from sizes alone. Add "
            "callbacks=[GreenTrainerCallback()] to the Trainer, or call model.base_model.update_and_allocate(step, "
            "optimizer) in every step of the loop.",
            stacklevel=2,
        )
