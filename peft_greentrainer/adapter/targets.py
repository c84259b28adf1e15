"""Which modules a config names: `target_modules`, `exclude_modules`, `layers_to_transform`, as peft understands them.

>>> bool(matches(GreenTrainerConfig(target_modules=["q_proj"]), "model.layers.0.self_attn.q_proj"))
True
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TaskType
from peft.utils.error import NoMatchingPeftModuleError

from .config import GreenTrainerConfig
from .model_tensors import ModelTensors


# The heads that peft puts into `modules_to_save` for a task; for some of them only after the modules were wrapped.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def matches(config: GreenTrainerConfig, key: str) -> Any:
    """Whether the config targets a module and does not exclude it; what is false may be peft's marker of exclusion."""
    config = copy.copy(config)
    if config.layers_to_transform is not None:
        # peft looks for the layer of a module only if it was found by the end of its name.
        in_layers = copy.copy(config)
        in_layers.target_modules = list({key.rpartition(".")[2]} - {key})
        found = check_target_module_exists(in_layers, key)
        if not found:
            return found
        config.layers_to_transform = None
    if config.target_modules is None:
        config.target_modules = ".*"
    return check_target_module_exists(config, key)


def check_patterns(config: GreenTrainerConfig, found: ModelTensors) -> None:
    """Raise `NoMatchingPeftModuleError`, which is a `ValueError`, if something that the config names is not in the model."""
    owners = [*found.owners, *found.saved]
    for field in ("target_modules", "exclude_modules"):
        patterns = getattr(config, field) or []
        for pattern in [patterns] if isinstance(patterns, str) else sorted(patterns):
            if isinstance(patterns, str):
                matched = any(re.fullmatch(pattern, key) for key in owners)
            else:
                matched = any(key == pattern or key.endswith(f".{pattern}") for key in owners)
            if not matched:
                raise NoMatchingPeftModuleError(
                    f"{field}={pattern!r} matches no module that owns floating-point parameters. Modules of this model: "
                    f"{', '.join(owners[:4])}, ..."
                )
    numbers = config.layers_to_transform
    for number in [numbers] if isinstance(numbers, int) else numbers or []:
        if not any(matches(dataclasses.replace(config, layers_to_transform=[number]), key) for key in owners):
            raise NoMatchingPeftModuleError(
                f"layers_to_transform={number} with layers_pattern={config.layers_pattern!r} matches no module. Modules of "
                f"this model: {', '.join(owners[:4])}, ..."
            )
    for name in set(config.modules_to_save or []).difference(*TASK_HEADS.values()):
        if not any(key == name or key.endswith(f".{name}") for key in found.modules):
            raise NoMatchingPeftModuleError(f"modules_to_save={name!r} matches no module of this model.")
