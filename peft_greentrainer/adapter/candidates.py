"""Which tensors are candidates, and which modules have to be wrapped for them.

>>> plan = plan_wrappers(GreenTrainerConfig(target_modules=["q_proj", "v_proj"]), model)
>>> own, tied = plan["model.layers.0.self_attn.q_proj"]
>>> list(own), tied
(['weight'], {})
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TaskType
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..tensors.names import base_name, tensor_of
from ..tensors.trainable import can_be_trained
from .config import GreenTrainerConfig
from .layer import GreenTrainerLayer, bare
from .linear import names_of_both
from .same_class import Inside


# The heads that peft puts into `modules_to_save` for a task; for some of them only after the modules were wrapped.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# For each module: the candidate tensors that it owns, and for those that it reads from another module, which and where.
WrapperPlan = dict[str, tuple[dict[str, Tensor], dict[str, tuple[str, str]]]]


def plan_wrappers(config: GreenTrainerConfig, model: nn.Module) -> WrapperPlan:
    """Which modules to wrap: for each, the candidate tensors that it owns and those that it reads from another owner.

    A tensor that several modules share belongs to the first of them. It is a candidate if any of them is targeted and
    none is excluded. What was frozen before the model was wrapped is one only where `target_modules` names it.
    """
    owners = _owners(model)
    _check_patterns(config, model, [*owners, *_names_of_saved(model)])
    excluded = copy.copy(config)
    excluded.target_modules = ".*"
    saved = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for parameter in module.original_module.parameters()
    }
    uses = defaultdict(list)
    for key, module in owners.items():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            if can_be_trained(tensor) and id(tensor) not in saved and tensor_of(name) == name:
                uses[id(tensor)].append((key, name, tensor))
    chosen = []
    for shared in uses.values():
        targeted = any(matches(config, key) for key, _, _ in shared)
        if targeted and all(matches(excluded, key) for key, _, _ in shared):
            chosen.append(shared)
    if config.target_modules is None and (frozen := set(config.frozen or ())):
        names = [{base_name(f"{key}.{name}") for key, name, _ in shared} for shared in chosen]
        # Were all of them frozen, it was not to keep them from being trained here; nor are those that a file changes.
        if any(map(frozen.isdisjoint, names)):
            frozen.difference_update(config.tensors or ())
            chosen = [shared for shared, of_tensor in zip(chosen, names) if frozen.isdisjoint(of_tensor)]
    plan: WrapperPlan = defaultdict(lambda: ({}, {}))
    for (owner, owned, tensor), *readers in chosen:
        plan[owner][0][owned] = tensor
        for key, name, _ in readers:
            plan[key][1][name] = (owner, owned)
    return dict(plan)


def uses(plan: WrapperPlan) -> Iterator[tuple[str, str, str]]:
    """Every use of a candidate tensor, by its owner or by who reads it: the module, its name there, and that of the tensor."""
    for key, (own, read) in plan.items():
        for name in own:
            yield key, name, base_name(f"{key}.{name}")
        for name, (owner, owned) in read.items():
            yield key, name, base_name(f"{owner}.{owned}")


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own floating-point parameters and whose children own none, by name; wrappers unwrapped."""
    owners, inside = {}, []
    for key, module in model.named_modules():
        if any(key.startswith(prefix) for prefix in inside[-1:]):
            continue
        if isinstance(module, (GreenTrainerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{key}.")
        module = bare(module)
        nested = any(True for child in module.children() for _ in child.parameters())
        # Never called: whoever holds it is. Or its own code asks for items, which a wrapper does not have.
        container = isinstance(module, (nn.ParameterList, nn.ParameterDict)) or hasattr(type(module), "__getitem__")
        if key and not nested and not container and any(map(can_be_trained, module.parameters(recurse=False))):
            if not names_of_both(module):
                owners[key] = module
    return owners


def readers(model: nn.Module, plan: WrapperPlan) -> Iterator[tuple[nn.Module, str, str, str]]:
    """The modules that are not wrapped and hold a candidate tensor of one that is: each, its name there, and the owner's."""
    owned = {id(tensor): (key, name) for key, (own, _) in plan.items() for name, tensor in own.items()}
    for key, module in model.named_modules():
        if key not in plan and not isinstance(module, Inside):
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in owned:
                    yield module, name, *owned[id(parameter)]


def left_out(model: nn.Module) -> Iterator[str]:
    """Why tensors of modules that could be wrapped are no candidates: what their module or they are called."""
    for key, module in model.named_modules():
        nested = any(True for child in module.children() for _ in child.parameters())
        for name, parameter in module.named_parameters(recurse=False):
            if nested or not can_be_trained(parameter):
                continue
            if tensor_of(name) != name:
                yield f"{key}.{name} (which reads like the name of a low-rank update)"
            elif names := names_of_both(module):
                yield f"{key}.{name} (its module has a {names[0]}, and so has the wrapper)"


def _names_of_saved(model: nn.Module) -> list[str]:
    """The names of modules to save and of what is in them, where an earlier adapter has wrapped them."""
    saved = [key for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [key for key, _ in model.named_modules() if any(f"{key}.".startswith(f"{prefix}.") for prefix in saved)]


def matches(config: GreenTrainerConfig, key: str) -> Any:
    """Whether the config targets a module and does not exclude it; what is false may be peft's marker of exclusion."""
    config = copy.copy(config)
    if config.layers_to_transform is not None:
        # peft looks for the layer of a module only if it was found by the end of its name.
        in_layers = copy.copy(config)
        in_layers.target_modules = {key.rpartition(".")[2]} - {key}
        found = check_target_module_exists(in_layers, key)
        if not found:
            return found
        config.layers_to_transform = None
    if config.target_modules is None:
        config.target_modules = ".*"
    return check_target_module_exists(config, key)


def _check_patterns(config: GreenTrainerConfig, model: nn.Module, owners: Iterable[str]) -> None:
    for field in ("target_modules", "exclude_modules"):
        patterns = getattr(config, field) or []
        for pattern in [patterns] if isinstance(patterns, str) else sorted(patterns):
            if isinstance(patterns, str):
                found = any(re.fullmatch(pattern, key) for key in owners)
            else:
                found = any(key == pattern or key.endswith(f".{pattern}") for key in owners)
            if not found:
                raise NoMatchingPeftModuleError(
                    f"{field}={pattern!r} matches no module that owns floating-point parameters. Modules of this model: "
                    f"{', '.join(list(owners)[:4])}, ..."
                )
    numbers = config.layers_to_transform
    for number in [numbers] if isinstance(numbers, int) else numbers or []:
        if not any(matches(dataclasses.replace(config, layers_to_transform=[number]), key) for key in owners):
            raise NoMatchingPeftModuleError(
                f"layers_to_transform={number} with layers_pattern={config.layers_pattern!r} matches no module. Modules of "
                f"this model: {', '.join(list(owners)[:4])}, ..."
            )
    for name in set(config.modules_to_save or []).difference(*TASK_HEADS.values()):
        if not any(key == name or key.endswith(f".{name}") for key, _ in model.named_modules()):
            raise NoMatchingPeftModuleError(f"modules_to_save={name!r} matches no module of this model.")
