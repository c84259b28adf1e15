"""The tensors of a model that have a trained value, and those of them that are being trained.

    >>> set_values(base, "default", {"lm_head.weight", "model.norm.weight"})   # ... start at the base tensors
    >>> set_selection(base, "default", {"lm_head.weight"})                     # the other one stays as it is

The layers hold both. What requires grad and what the adapter's config says, which is saved with it, follow from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..tensors.forms import seed_of
from ..tensors.names import base_name, is_low_rank, tensor_of
from ..tensors.trainable import can_be_trained
from .candidates import Candidates, candidates_of
from .config import GreenTrainerConfig
from .fingerprint import fingerprint
from .layer import GreenTrainerLayer
from .linear import GreenTrainerLinear
from .model_tensors import find_tensors
from .refusals import refuse_replaced


def layers(model: nn.Module) -> dict[str, GreenTrainerLayer]:
    """The wrappers in a model, by the name of the module in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {base_name(name): module for name, module in base.named_modules() if isinstance(module, GreenTrainerLayer)}


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, GreenTrainerLayer]:
    """Those of them that have this adapter."""
    return {key: layer for key, layer in layers(model).items() if adapter_name in layer.greentrainer_values}


def config_of(model: nn.Module, adapter_name: str) -> GreenTrainerConfig:
    """The config of an adapter of this model."""
    return cast(dict[str, GreenTrainerConfig], model.peft_config)[adapter_name]


def candidates(model: nn.Module, config: GreenTrainerConfig) -> list[str]:
    """What an adapter with this config may train: tensors, and low-rank forms of them. It may be injected already or not."""
    for adapter_name, other in getattr(model, "peft_config", {}).items():
        if other is config:
            return list(candidates_of(model, adapter_name).names)
    return list(Candidates.of(find_tensors(model), config).names)


def parameters_in_use(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of a base model by its name there, with an adapter's own in place of the base's.

    Its own are values, which go by the names of their tensors, factors, and what is in its modules to save. Names come
    from where a wrapper stands: what stands inside it has the name of what it wraps.
    """
    found: dict[str, nn.Parameter] = {}
    seen = set()

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, GreenTrainerLayer):
            values = module.greentrainer_values
            for tensor, value in values[adapter_name].items() if adapter_name in values else ():
                found[base_name(f"{name}.{tensor}")] = value
            return walk(name, module.base_layer)
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save
            return walk(name, saved[adapter_name] if adapter_name in saved else module.original_module)
        for tensor, parameter in module.named_parameters(prefix=name, recurse=False):
            if can_be_trained(parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                found.setdefault(base_name(tensor), parameter)
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    return found


def set_values(model: nn.Module, adapter_name: str, candidates: Iterable[str]) -> None:
    """Make exactly these candidates have a value: missing ones start at the base tensor, others are dropped.

    Raises:
        ValueError: one of them is no candidate of the adapter, or its module was replaced.
    """
    wanted = set(candidates)
    refuse_strangers(model, adapter_name, wanted)
    wrappers = layers(model)
    refuse_replaced(candidates_of(model, adapter_name).names, wrappers)
    for key, layer in wrappers.items():
        for name in layer.candidates_with_values(adapter_name):
            if f"{key}.{name}" not in wanted:
                layer.drop_value(adapter_name, name)
    for candidate in candidates_of(model, adapter_name).names:
        key, _, name = candidate.rpartition(".")
        if candidate in wanted and name not in wrappers[key].candidates_with_values(adapter_name):
            add_value(wrappers[key], adapter_name, candidate)
    follow_selection(model, adapter_name)


def add_value(layer: GreenTrainerLayer, adapter_name: str, candidate: str, init_weights: bool = True) -> None:
    """Create the value of a candidate, which is named as in the base model."""
    name = candidate.rpartition(".")[2]
    if is_low_rank(candidate):
        cast(GreenTrainerLinear, layer).add_factors(adapter_name, name, init_weights, seed_of(candidate))
    else:
        layer.add_value(adapter_name, name, init_weights)


def set_selection(model: nn.Module, adapter_name: str, candidates: Iterable[str], provisional: bool = False) -> None:
    """Train exactly these candidates, all of which have a value."""
    selected = set(candidates)
    for key, layer in layers_with(model, adapter_name).items():
        here = {name for name in layer.candidates_with_values(adapter_name) if f"{key}.{name}" in selected}
        layer.greentrainer_values[adapter_name].note_selected(here, provisional)
    follow_selection(model, adapter_name)


def follow_selection(model: nn.Module, adapter_name: str) -> None:
    """Let `requires_grad` and the adapter's config follow the layers, where it is decided what is selected.

    Values require grad where the adapter is active and for training. Fingerprints that the config has are kept.
    """
    config, candidates = config_of(model, adapter_name), candidates_of(model, adapter_name)
    wrappers = layers_with(model, adapter_name)
    held, selected = held_candidates(wrappers, adapter_name)
    taken = config.tensors or {}
    config.tensors = {
        name: taken.get(name) or fingerprint_of(name, candidates, wrappers)
        for name in candidates.names
        if name in held
    }
    config.selected = [name for name in config.tensors if name in selected]
    config.provisional = all(layer.greentrainer_values[adapter_name].is_provisional for layer in wrappers.values())
    for layer in wrappers.values():
        trainable = adapter_name in layer.active_adapters and not config.inference_mode
        layer.update_requires_grad(adapter_name, trainable)


def held_candidates(wrappers: Mapping[str, GreenTrainerLayer], adapter_name: str) -> tuple[set[str], set[str]]:
    """The candidates that have a value in these layers, and those that are selected there."""
    held, selected = set(), set()
    for key, layer in wrappers.items():
        held |= {f"{key}.{name}" for name in layer.candidates_with_values(adapter_name)}
        selected |= {f"{key}.{name}" for name in layer.greentrainer_values[adapter_name].selected_candidates}
    return held, selected


def fingerprint_of(candidate: str, candidates: Candidates, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The fingerprint of a candidate's base tensor, which wrappers know even where an adapter is merged into it."""
    key, _, name = tensor_of(candidate).rpartition(".")
    module = modules[key]
    data = module.base_data(name) if isinstance(module, GreenTrainerLayer) else module.get_parameter(name).data
    return fingerprint(data, candidates.tied[tensor_of(candidate)])


def refuse_strangers(model: nn.Module, adapter_name: str, names: set[str]) -> None:
    """Raise `ValueError` if some of these are no candidates of the adapter."""
    strangers = names.difference(candidates_of(model, adapter_name).names)
    if strangers:
        raise ValueError(
            f"The adapter '{adapter_name}' has no place for {sorted(strangers)[:3]}: was it made for this model, with these "
            "target_modules, and with the same parts frozen before? A saved adapter brings its own with it: load it under "
            "another name, or with PeftModel.from_pretrained onto a base without adapters."
        )


def selected_values(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """What an adapter trains now: values and factors, by their names in the base model."""
    return {
        f"{key}.{name}": value
        for key, layer in layers_with(model, adapter_name).items()
        for name, value in layer.greentrainer_values[adapter_name].items()
        if value.requires_grad
    }
