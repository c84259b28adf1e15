"""What tensors are called: in the base model, in a file, and in each of the forms in which they can be trained.

    >>> candidate_of_key("base_model.model.model.norm.greentrainer_values.weight", modules={"model.norm"})
    'model.norm.weight'
    >>> low_rank_form("layers.0.q_proj.weight")       # the candidate beside the whole tensor
    'layers.0.q_proj.weight_low_rank'
    >>> factors("layers.0.q_proj.weight_low_rank")    # the parameters that it trains
    ('layers.0.q_proj.weight_low_rank_A', 'layers.0.q_proj.weight_low_rank_B')

A *candidate* is a tensor that may be trained whole, by the name of the tensor, or as a low-rank update, by that of its form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable


# Between the name of a module and those of its values, in a state dict and in the file.
VALUES = ".greentrainer_values."
# What a `PeftModel` puts before the names of the base model.
PREFIX = "base_model.model."
# Before the names of what is trained around a base model: no name in a base model begins with it.
OUTSIDE = "(outside)."

# Modules that torch.compile and FSDP1 put around another, which is then called so.
PUT_BETWEEN = ("_orig_mod", "_fsdp_wrapped_module")

LOW_RANK = "_low_rank"
FACTORS = ("_A", "_B")


def base_name(name: str) -> str:
    """The name of a module or a tensor in the base model, without what torch.compile and FSDP1 put into it."""
    return ".".join(part for part in name.split(".") if part not in PUT_BETWEEN)


def kind_of(name: str) -> str:
    """The name without the numbers of layers: model.layers.3.mlp.up_proj.weight -> model.layers.*.mlp.up_proj.weight"""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def candidate_of_key(key: str, modules: Collection[str]) -> str:
    """The candidate that an entry of the file belongs to, by its name in a base model that has these modules.

    A state that was taken from a `PeftModel` has its prefix; but a base may have a `base_model.model` of its own.
    """
    module, _, value = base_name(key).rpartition(VALUES)
    return candidate_of(f"{module if module in modules else module.removeprefix(PREFIX)}.{value}")


def candidates_in(keys: Iterable[str], modules: Collection[str]) -> list[str]:
    """The candidates that have an entry in a file or a state dict, by their names in a base model with these modules."""
    return list(dict.fromkeys(candidate_of_key(key, modules) for key in keys if VALUES in key))


def low_rank_form(tensor: str) -> str:
    """The candidate that stands for a low-rank update of this tensor."""
    return tensor + LOW_RANK


def is_low_rank(candidate: str) -> bool:
    return candidate.endswith(LOW_RANK)


def tensor_of(name: str) -> str:
    """The tensor that a candidate, or a parameter of one, trains in whichever form."""
    return candidate_of(name).removesuffix(LOW_RANK)


def factors(candidate: str) -> tuple[str, str]:
    """The two parameters of a low-rank candidate."""
    return candidate + FACTORS[0], candidate + FACTORS[1]


def candidate_of(parameter: str) -> str:
    """The candidate that a parameter belongs to: a factor to a low-rank form, any other to the whole tensor.

    >>> candidate_of("q_proj.weight"), candidate_of("q_proj.weight_low_rank_B")
    ('q_proj.weight', 'q_proj.weight_low_rank')
    """
    form = parameter[: -len(FACTORS[0])]
    return form if parameter.endswith(FACTORS) and is_low_rank(form) else parameter
