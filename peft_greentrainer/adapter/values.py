"""The tensors of a model that have a trained value, and those of them that are being trained.

    >>> set_values(base, "default", {"lm_head.weight", "model.norm.weight"})   # ... start at the base tensors
    >>> set_selection(base, "default", {"lm_head.weight"})                     # the other one stays as it is

Both are written in the adapter's config, which is saved with it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Set

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..tensors.forms import seed_of
from ..tensors.names import base_name, is_low_rank, low_rank_form
from ..tensors.trainable import can_be_trained
from .candidates import WrapperPlan, plan_wrappers, uses
from .config import GreenTrainerConfig
from .fingerprint import fingerprint
from .layer import GreenTrainerLayer, bare
from .linear import can_be_low_rank
from .refusals import refuse_replaced


def layers(model: nn.Module) -> dict[str, GreenTrainerLayer]:
    """The wrappers in a model, by the name of the module in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {base_name(name): module for name, module in base.named_modules() if isinstance(module, GreenTrainerLayer)}


def parameters_in_use(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of a base model by its name there, with an adapter's own in place of the base's.

    Its own are values, which go by the names of their tensors, factors, and what is in its modules to save. Names come
    from where a wrapper stands: what stands inside it has the name of what it wraps.
    """
    found, seen = {}, set()

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


def candidate_tensors(
    plan: WrapperPlan, model: nn.Module, config: GreenTrainerConfig
) -> dict[str, tuple[Tensor, list[str]]]:
    """The base tensor of every candidate, each with the other names that it is tied to."""
    tied, of_linear = defaultdict(list), set()
    for key, name, tensor in uses(plan):
        if (here := base_name(f"{key}.{name}")) != tensor:
            tied[tensor].append(here)
        if name == "weight" and can_be_low_rank(bare(model.get_submodule(key))):
            of_linear.add(tensor)
    found = {}
    for key, (own, _) in plan.items():
        module = model.get_submodule(key)
        for name, tensor in own.items():
            full_name = base_name(f"{key}.{name}")
            data = module.base_data(name) if isinstance(module, GreenTrainerLayer) else tensor.data
            if not (config.low_rank == "only" and full_name in of_linear):
                found[full_name] = data, tied[full_name]
            if config.low_rank and full_name in of_linear and not tied[full_name]:
                found[low_rank_form(full_name)] = data, []
    return found


def candidates(model: nn.Module, config: GreenTrainerConfig) -> list[str]:
    """What the adapter with this config may train: tensors, and low-rank forms of them."""
    return list(candidate_tensors(plan_wrappers(config, model), model, config))


def set_values(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Make exactly these candidates have a value: missing ones start at the base tensor, others are dropped."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    found = candidate_tensors(plan_wrappers(config, model), model, config)
    if not tensors <= found.keys():
        raise ValueError(_no_place_for(tensors - found.keys(), adapter_name))
    wrappers = layers(model)
    refuse_replaced(found, wrappers)
    for key, layer in wrappers.items():
        for name in layer.candidates_with_values(adapter_name):
            if f"{key}.{name}" not in tensors:
                layer.drop_value(adapter_name, name)
    old, config.tensors = config.tensors or {}, {}
    for full_name in found:
        if full_name in tensors:
            key, _, name = full_name.rpartition(".")
            layer = wrappers[key]
            if name not in layer.candidates_with_values(adapter_name):
                add_value(layer, adapter_name, full_name)
            config.tensors[full_name] = old.get(full_name) or fingerprint(*found[full_name])


def add_value(layer: GreenTrainerLayer, adapter_name: str, candidate: str, init_weights: bool = True) -> None:
    """Create the value of a candidate, which is named as in the base model."""
    name = candidate.rpartition(".")[2]
    if is_low_rank(candidate):
        layer.add_factors(adapter_name, name, init_weights, seed_of(candidate))
    else:
        layer.add_value(adapter_name, name, init_weights)


def set_selection(model: nn.Module, adapter_name: str, tensors: Iterable[str], provisional: bool = False) -> None:
    """Train exactly these tensors, all of which have a value."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    config.selected = [name for name in config.tensors if name in tensors]
    config.provisional = provisional
    set_trainable(model, adapter_name, tensors)


def set_trainable(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Let the values of these tensors require grad, where the adapter is active and for training, and no others."""
    tensors = set(tensors)
    config = model.peft_config[adapter_name]
    for key, layer in layers(model).items():
        if adapter_name in layer.greentrainer_values:
            selected = {name for name in layer.candidates_with_values(adapter_name) if f"{key}.{name}" in tensors}
            trainable = adapter_name in layer.active_adapters and not config.inference_mode
            layer.set_selected(adapter_name, selected, trainable, config.provisional)


def follow_layers(model: nn.Module) -> None:
    """Write in the configs what the layers hold, into which a state dict was loaded."""
    for adapter_name, config in getattr(model, "peft_config", {}).items():
        wrappers = {key: layer for key, layer in layers(model).items() if adapter_name in layer.greentrainer_values}
        held, selected = set(), set()
        for key, layer in wrappers.items():
            held |= {f"{key}.{name}" for name in layer.candidates_with_values(adapter_name)}
            selected |= {f"{key}.{name}" for name in layer.greentrainer_values[adapter_name].selected_candidates}
        of_layers = [layer.greentrainer_values[adapter_name] for layer in wrappers.values()]
        loaded = any(values.just_loaded for values in of_layers)
        if not of_layers or not loaded and (held, selected) == (set(config.tensors), set(config.selected)):
            continue
        found = candidate_tensors(plan_wrappers(config, model), model, config)
        if not held <= found.keys():
            raise ValueError(_no_place_for(held - found.keys(), adapter_name))
        # The base tensors may have been loaded too.
        config.tensors = {name: fingerprint(*found[name]) for name in found if name in held}
        set_selection(model, adapter_name, selected, provisional=all(values.is_provisional for values in of_layers))
        if loaded:
            let_all_require_grad(model, adapter_name)


def let_all_require_grad(model: nn.Module, adapter_name: str) -> None:
    """Let every value require grad until the first pass, where the adapter is active and for training.

    An optimizer's state is loaded by position, and what was deselected has a place too.
    """
    config = model.peft_config[adapter_name]
    for layer in layers(model).values():
        if adapter_name in layer.greentrainer_values:
            values = layer.greentrainer_values[adapter_name]
            values.just_loaded = True
            values.requires_grad_(adapter_name in layer.active_adapters and not config.inference_mode)


def selected_values(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """What an adapter trains now: values and factors, by their names in the base model."""
    of_layers = {key: layer.greentrainer_values for key, layer in layers(model).items()}
    return {
        f"{key}.{name}": value
        for key, of_layer in of_layers.items()
        if adapter_name in of_layer
        for name, value in of_layer[adapter_name].items()
        if value.requires_grad
    }


def warn_if_never_selected(model: nn.Module, adapter_name: str) -> None:
    config = model.peft_config[adapter_name]
    if not (config.provisional and config.init_weights) or config.spent:  # it is being selected
        return
    moved = any(
        not layer.base_tensor(tensor).is_meta and layer.get_delta_weight(adapter_name, tensor).any()
        for layer in layers(model).values()
        if adapter_name in layer.greentrainer_values and not layer.merged
        for tensor in layer.changed_tensors(adapter_name)
    )
    if moved:
        warnings.warn(
            "This adapter was trained, but no selection was ever made: what was trained was chosen from sizes alone. Add "
            "callbacks=[GreenTrainerCallback()] to the Trainer, or call model.base_model.update_and_allocate(step, "
            "optimizer) in every step of the loop.",
            stacklevel=2,
        )


def _no_place_for(tensors: Set[str], adapter_name: str) -> str:
    return (
        f"The adapter '{adapter_name}' has no place for {sorted(tensors)[:3]}: was it made for this model, with these "
        "target_modules, and with the same parts frozen before? A saved adapter brings its own with it: load it under "
        "another name, or with PeftModel.from_pretrained onto a base without adapters."
    )
