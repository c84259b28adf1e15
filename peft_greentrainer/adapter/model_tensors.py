"""The tensors of a model that a wrapper could train, and which modules use each of them. Names only, computed once.

>>> find_tensors(model).tensors[0].uses             # the first module owns the tensor, the others read it
(Use(module='model.embed_tokens', name='weight'), Use(module='lm_head', name='weight'))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..tensors.forms import has_low_rank_form
from ..tensors.names import base_name, tensor_of
from ..tensors.trainable import can_be_trained
from .layer import GreenTrainerLayer, base_layer_of
from .linear import names_of_both
from .same_class import Inside


class Use(NamedTuple):
    """A module by its name in the base model, and what it calls a tensor."""

    module: str
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model.

    Attributes:
        uses: the modules that can be wrapped and have it. The first one owns it, the others are tied to it.
        held_by: the modules that cannot be wrapped and have it too.
        is_linear: whether it is the weight of a module that does what `F.linear` does.
    """

    uses: tuple[Use, ...]
    held_by: tuple[Use, ...]
    is_linear: bool

    @property
    def name(self) -> str:
        return self.uses[0].full_name


@dataclass(frozen=True)
class ModelTensors:
    """What a model has.

    Attributes:
        tensors: in the order of the modules that own them.
        owners: the modules that could be wrapped.
        saved: the modules to save of earlier adapters, and what is in them.
        modules: all modules.
    """

    tensors: tuple[ModelTensor, ...]
    owners: tuple[str, ...]
    saved: tuple[str, ...]
    modules: tuple[str, ...]


def find_tensors(model: nn.Module) -> ModelTensors:
    """Find the tensors that modules which can be wrapped own, but for those of modules to save.

    Args:
        model: a base model, with wrappers of earlier adapters or without.
    """
    owners = _owners(model)
    aside = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    saved = {id(parameter) for module in aside for parameter in module.original_module.parameters()}
    uses: dict[int, list[Use]] = defaultdict(list)
    linear = set()
    for key, module in owners.items():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            if can_be_trained(tensor) and id(tensor) not in saved and tensor_of(name) == name:
                uses[id(tensor)].append(Use(key, name))
                if name == "weight" and has_low_rank_form(module):
                    linear.add(id(tensor))
    held: dict[int, list[Use]] = defaultdict(list)
    modules = named_modules(model)
    for key, module in modules.items():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(tensor) in uses and Use(key, name) not in uses[id(tensor)]:
                held[id(tensor)].append(Use(key, name))
    return ModelTensors(
        tensors=tuple(ModelTensor(tuple(of), tuple(held[i]), i in linear) for i, of in uses.items()),
        owners=tuple(owners),
        saved=tuple(_names_of_saved(model)),
        modules=tuple(modules),
    )


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base model by their names there; wrappers in place of what they wrap."""
    return {base_name(key): module for key, module in model.named_modules() if not isinstance(module, Inside)}


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own floating-point parameters and whose children own none, by name; wrappers unwrapped."""
    owners: dict[str, nn.Module] = {}
    inside: list[str] = []
    for key, module in model.named_modules():
        if any(key.startswith(prefix) for prefix in inside[-1:]):
            continue
        if isinstance(module, (GreenTrainerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{key}.")
        module = base_layer_of(module)
        nested = any(True for child in module.children() for _ in child.parameters())
        # Never called: whoever holds it is. Or its own code asks for items, which a wrapper does not have.
        container = isinstance(module, (nn.ParameterList, nn.ParameterDict)) or hasattr(type(module), "__getitem__")
        if key and not nested and not container and any(map(can_be_trained, module.parameters(recurse=False))):
            if not names_of_both(module):
                owners[base_name(key)] = module
    return owners


def _names_of_saved(model: nn.Module) -> list[str]:
    """The names of modules to save and of what is in them, where an earlier adapter has wrapped them."""
    saved = [key for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = [key for key, _ in model.named_modules() if any(f"{key}.".startswith(f"{prefix}.") for prefix in saved)]
    return list(map(base_name, inside))


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
