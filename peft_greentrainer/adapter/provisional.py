"""What is trained until the first probe has measured anything: chosen from sizes alone.

    >>> provisional_selection(base, GreenTrainerConfig(rho=0.5), candidates(base, config))[0]
    'model.layers.24.mlp.up_proj.weight'

A selection starts at the loss, since nothing can be trained without the activation gradients that lead to it: these are the
last candidates of the model, as many as `rho` pays for. The cost graph is exact, and needs a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..tensors.names import base_name, is_low_rank, tensor_of
from .candidates import plan_wrappers, uses
from .config import GreenTrainerConfig
from .layer import bare


def provisional_selection(model: nn.Module, config: GreenTrainerConfig, offered: Iterable[str]) -> list[str]:
    """The last of these candidates whose training costs about `rho`, going by sizes.

    A use of a tensor costs its size in the forward pass, again where activation gradients pass it, and again for its own
    gradient. Factors cost theirs three times, and looking something up costs nothing.
    """
    form_of = {tensor_of(candidate): candidate for candidate in offered}  # the low-rank form, where there is one
    order = {key: i for i, (key, _) in enumerate(model.named_modules())}
    all_uses = sorted(uses(plan_wrappers(GreenTrainerConfig(), model)), key=lambda use: order[use[0]])
    passed, own_cost = [], defaultdict(int)
    for key, name, tensor in all_uses:
        module = bare(model.get_submodule(key))
        shape = getattr(module, name).shape
        size = 0 if isinstance(module, nn.Embedding) else shape.numel()
        low_rank = is_low_rank(form_of.get(tensor, tensor))
        own_cost[tensor] += 3 * config.form.rank * sum(shape) if low_rank else size
        passed.append((tensor, size, tensor == base_name(f"{key}.{name}")))

    room = (3 * config.rho - 1) * sum(size for _, size, _ in passed)
    selected = []
    for tensor, size, is_owner in reversed(passed):
        room -= size
        if is_owner and tensor in form_of:
            room -= own_cost[tensor]
            if room < 0 and selected:
                break
            selected.insert(0, form_of[tensor])
    return selected
