"""A delta for those who do not have this package: as a LoRA adapter, or as plain tensors of the base model.

    >>> lora_config, state_dict, left_out = convert_to_lora(model, rank=16)
    >>> left_out                                  # what LoRA has no place for: norms, biases, embeddings
    ['model.norm.weight']
    >>> save_file(export_tensors(model), "patch.safetensors")

Where all adapted modules are linear and `target_modules` names them, peft's own `convert_to_lora` and `save_as_lora` do too.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Union

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.conversion import _convert_module_to_lora
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapter.values import config_of, layers
from ..tensors.names import PREFIX, VALUES


class LoraConversion(NamedTuple):
    """A LoRA adapter, and the changed tensors that are not in it, by their names in the base model."""

    config: LoraConfig
    state_dict: dict[str, Tensor]
    left_out: list[str]


def convert_to_lora(model: nn.Module, rank: Union[int, float], adapter_name: str = "default") -> LoraConversion:
    """
    The nearest LoRA adapter: for every linear weight that the adapter changes, the best factors of the difference.

        >>> lora_config, state_dict, left_out = convert_to_lora(model, rank=0.95)

    Args:
        model (`nn.Module`): The model with the adapter.
        rank (`int` or `float`):
            The rank of the factors; a float in (0, 1] is the share of the squared singular values that they keep, so that
            each weight gets a rank of its own.
        adapter_name (`str`): The adapter to convert.

    Returns:
        [`LoraConversion`]: config, state dict with the keys of a saved adapter, and the names of what was left out.

    Raises:
        ValueError: No linear weight was changed, or the rank is neither from 1 nor a share.
    """
    if not (isinstance(rank, int) and rank >= 1 or isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(f"rank must be a number from 1, or a share in (0, 1]; got {rank!r}.")
    config = config_of(model, adapter_name)
    state_dict, ranks, left_out = {}, {}, []
    for key, layer in layers(model).items():
        for tensor in layer.changed_tensors(adapter_name):
            if tensor != "weight" or not layer.is_linear:
                left_out.append(f"{key}.{tensor}")
                continue
            most = min(rank, *layer.base_tensor("weight").shape) if isinstance(rank, int) else rank
            factor_a, factor_b, ranks[key] = _convert_module_to_lora(layer, most, adapter_name)
            state_dict[f"{PREFIX}{key}.lora_A.weight"] = factor_a
            state_dict[f"{PREFIX}{key}.lora_B.weight"] = factor_b
    if not state_dict:
        raise ValueError(f"The adapter '{adapter_name}' changes no linear weight, which is all that LoRA can hold.")
    lora_config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return LoraConversion(lora_config, state_dict | _modules_to_save(model, adapter_name), left_out)


def save_as_lora(
    path: Union[str, os.PathLike[str]], model: nn.Module, rank: Union[int, float], adapter_name: str = "default"
) -> list[str]:
    """
    Save the result of [`convert_to_lora`], to be loaded by peft alone, and return the names of what was left out.

        >>> save_as_lora("my-lora", model, rank=16)
        ['model.norm.weight']
    """
    converted = convert_to_lora(model, rank, adapter_name)
    os.makedirs(path, exist_ok=True)
    save_file(converted.state_dict, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    converted.config.inference_mode = True
    converted.config.save_pretrained(str(path))
    return converted.left_out


@torch.no_grad()
def export_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """
    The changed tensors as a merge would leave them, under their names in the base model and in its number format.

        >>> base.load_state_dict(export_tensors(model), strict=False)

    A tied tensor is there once, under the first of its names.
    """
    tensors = {
        f"{key}.{tensor}": layer.merged_tensor(adapter_name, tensor)
        for key, layer in layers(model).items()
        if adapter_name in layer.greentrainer_values
        for tensor in layer.own_changed_tensors([adapter_name])
    }
    return tensors | {key.removeprefix(PREFIX): t.clone() for key, t in _modules_to_save(model, adapter_name).items()}


def _modules_to_save(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    prefix = "" if isinstance(model, PeftModel) else PREFIX  # peft has given it already
    return {prefix + key: tensor for key, tensor in saved.items() if VALUES not in key}
