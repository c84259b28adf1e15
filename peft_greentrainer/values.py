"""The tensors of a model that have a trained value, and those of them that are being trained.

    >>> set_values(base, "default", {"lm_head.weight", "model.norm.weight"})   # ... start at the base tensors
    >>> set_selection(base, "default", {"lm_head.weight"})                     # the other one stays as it is

Both are written in the adapter's config, which is saved with it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import GreenTrainerConfig
from .delta import base_name, fingerprint
from .layer import GreenTrainerLayer
from .targets import WrapperPlan, plan_wrappers


def layers(model: nn.Module) -> dict[str, GreenTrainerLayer]:
    """The wrappers in a model, by the name of the module in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, GreenTrainerLayer)}


def candidate_tensors(plan: WrapperPlan, model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """The base tensors that may be trained, by name, each with the other names that it is tied to."""
    tied = defaultdict(list)
    for key, (_, readers) in plan.items():
        for name, (owner, owned) in readers.items():
            tied[base_name(f"{owner}.{owned}")].append(base_name(f"{key}.{name}"))
    found = {}
    for key, (own, _) in plan.items():
        module = model.get_submodule(key)
        for name, tensor in own.items():
            data = module.base_data(name) if isinstance(module, GreenTrainerLayer) else tensor.data
            found[base_name(f"{key}.{name}")] = data, tied[base_name(f"{key}.{name}")]
    return found


def candidates(model: nn.Module, config: GreenTrainerConfig) -> list[str]:
    """The names of the tensors that the adapter with this config may train."""
    return list(candidate_tensors(plan_wrappers(config, model), model))


def set_values(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Make exactly these tensors have a value: missing ones start at the base tensor, others are dropped."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    found = candidate_tensors(plan_wrappers(config, model), model)
    if not tensors <= found.keys():
        raise ValueError(
            f"The adapter '{adapter_name}' has no place for {sorted(tensors - found.keys())[:3]}: was it made for this "
            "model, with these target_modules?"
        )
    wrappers = layers(model)
    for key, layer in wrappers.items():
        for name in list(layer.greentrainer_values[adapter_name] if adapter_name in layer.greentrainer_values else ()):
            if f"{key}.{name}" not in tensors:
                layer.drop_value(adapter_name, name)
    old, config.tensors = config.tensors or {}, {}
    for full_name in found:
        if full_name in tensors:
            key, _, name = full_name.rpartition(".")
            layer = wrappers[key]
            if name not in layer.greentrainer_values[adapter_name]:
                layer.add_value(adapter_name, name)
            config.tensors[full_name] = old.get(full_name) or fingerprint(*found[full_name])


def set_selection(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Train exactly these tensors, all of which have a value."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    config.selected = [name for name in config.tensors if name in tensors]
    config.provisional = False
    set_trainable(model, adapter_name, tensors)


def set_trainable(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Let the values of these tensors require grad, where the adapter is active and for training, and no others."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    for key, layer in layers(model).items():
        if adapter_name in layer.greentrainer_values:
            selected = {name for name in layer.greentrainer_values[adapter_name] if f"{key}.{name}" in tensors}
            active = adapter_name in layer.active_adapters
            layer.set_selected(adapter_name, selected, trainable=active and not config.inference_mode)


def warn_if_never_selected(model: nn.Module, adapter_name: str) -> None:
    config = model.peft_config[adapter_name]
    if not (config.provisional and config.init_weights) or config.spent:  # it is being selected
        return
    moved = any(
        not value.is_meta and not torch.equal(value, layer.base_tensor(name).to(value.dtype))
        for layer in layers(model).values()
        if adapter_name in layer.greentrainer_values and not layer.merged
        for name, value in layer.greentrainer_values[adapter_name].items()
    )
    if moved:
        warnings.warn(
            "This adapter was trained, but no selection was ever made: what was trained was chosen from sizes alone. Add "
            "callbacks=[GreenTrainerCallback()] to the Trainer, or call model.base_model.update_and_allocate(step, "
            "optimizer) in every step of the loop.",
            stacklevel=2,
        )
