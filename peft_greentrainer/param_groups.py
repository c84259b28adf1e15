"""Keeps an optimizer's parameter groups in step with the selection. The optimizer stays the same object.

A newly selected tensor joins the group where transformers would have put it; one that is deselected loses its state
and stays, frozen, so that a resumed run finds the same parameters in the same places. Groups keep the order of
`named_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import Trainer

from .delta import base_name
from .forms import tensor_of
from .layer import GreenTrainerLayer


def group_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """For each base tensor of a wrapper, by its name in the base model: the group that its value is or would be in.

    A tensor without a value goes to the group of the nearest one with a value that transformers treats alike in weight
    decay, or, where there is none, to the group with the most (with the least) weight decay.
    """
    index_of_group = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    # An unbound call: the rule of transformers uses nothing of the Trainer.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names, decays, known = [], [], []
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer):
            for name, base in module.base_layer.named_parameters(recurse=False):
                adapters = module.greentrainer_values.values()
                values = [v[n] for v in adapters for n in v if tensor_of(n) == name]
                groups = [index_of_group[id(p)] for p in values if id(p) in index_of_group]
                names.append(base_name(f"{key}.{name}"))
                decays.append(f"{key}.base_layer.{name}" in decayed)
                known.append(groups[0] if groups else None)

    groups = optimizer.param_groups
    by_decay = sorted(range(len(groups)), key=lambda i: groups[i].get("weight_decay", 0.0))
    most_decay = max(by_decay, key=lambda i: (groups[i].get("weight_decay", 0.0), -i))
    least_decay = min(by_decay, key=lambda i: (groups[i].get("weight_decay", 0.0), -i))
    found = {}
    for place, (name, decay) in enumerate(zip(names, decays)):
        alike = [j for j, other in enumerate(known) if other is not None and decays[j] == decay]
        if known[place] is not None:
            index = known[place]
        elif alike:
            index = known[min(alike, key=lambda j: abs(j - place))]
        else:
            index = most_decay if decay else least_decay
        found[name] = groups[index]
    return found


def keep_in_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    groups: dict[str, dict],
    adapter_name: str,
    dropped: Iterable[nn.Parameter],
) -> None:
    """Let values that are new join their group, forget the state of those that are frozen, and remove `dropped` ones."""
    dropped = {id(p) for p in dropped}
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, module in model.named_modules():
        if isinstance(module, GreenTrainerLayer) and adapter_name in module.greentrainer_values:
            for name, value in module.greentrainer_values[adapter_name].items():
                if id(value) not in members:
                    groups[tensor_of(base_name(f"{key}.{name}"))]["params"].append(value)
                if not value.requires_grad:
                    optimizer.state.pop(value, None)

    place = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in dropped:
                optimizer.state.pop(parameter, None)
        kept = [p for p in group["params"] if id(p) not in dropped]
        kept.sort(key=lambda p: place.get(id(p), (-1, ""))[0])
        group["params"][:] = kept
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"]))
            group["param_names"] = [place[id(p)][1] if id(p) in place else names[id(p)] for p in kept]
