"""The model card of a delta: what was trained, within which budget, what that saved, and how to load it.

>>> describe(model, "my-delta")                   # rewrites its part of my-delta/README.md

peft writes the card and calls this at its end. The license is left to the user.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from typing import Optional

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..adapter.config import GreenTrainerConfig
from ..tensors.names import is_low_rank, kind_of, tensor_of


BEGIN, END = "<!-- peft-greentrainer: begin -->", "<!-- peft-greentrainer: end -->"
TAG = "greentrainer"


def describe(model: PeftModel, output_dir: str) -> None:
    """Describe the GreenTrainer adapters of `model` in the card in a folder, in place of an older description."""
    configs = {n: config for n, config in model.peft_config.items() if isinstance(config, GreenTrainerConfig)}
    if not configs:
        return
    path = os.path.join(output_dir, "README.md")
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    base = model.get_base_model()
    parts = [_usage(base, card.data.get("base_model"))]
    parts += [_training(config, f", adapter `{name}`" if len(configs) > 1 else "") for name, config in configs.items()]
    text = "\n\n".join([BEGIN, *parts, END])
    if BEGIN in card.text and END in card.text:
        before, after = card.text.partition(BEGIN)[0], card.text.partition(END)[2]
    else:
        # Below the title, above peft's questions for the author.
        title, _, rest = card.text.lstrip().partition("\n")
        before, after = f"{title}\n\n", f"\n{rest}"
    card.text = before + text + after
    card.save(path)


def _usage(base: nn.Module, base_id: Optional[str]) -> str:
    lines = ["import peft_greentrainer  # pip install peft-greentrainer", "from peft import PeftModel"]
    if isinstance(base, PreTrainedModel):
        cls = type(base).__name__
        lines += [
            f"from transformers import {cls}",
            "",
            f'base = {cls}.from_pretrained("{base_id or "the-base-model"}")',
        ]
    else:
        lines += ["", f"base = {type(base).__name__}(...)"]
    lines += ['model = PeftModel.from_pretrained(base, "the-name-of-this-repository")']
    return "\n".join(
        [
            "## How to load it",
            "",
            "This is a peft adapter of the type GREENTRAINER, which the package `peft-greentrainer` adds to peft:",
            "",
            "```python",
            *lines,
            "```",
        ]
    )


def _training(config: GreenTrainerConfig, of_adapter: str) -> str:
    kinds = defaultdict(list)
    for name, print_ in (config.tensors or {}).items():
        shape = print_["shape"]
        if is_low_rank(name):
            rank = config.form.rank
            kinds[f"`{kind_of(tensor_of(name))}`, low-rank update"].append(rank * sum(shape))
        else:
            kinds[f"`{kind_of(name)}`"].append(math.prod(shape))
    unit, bound = {"flops": ("FLOPs", "at most"), "seconds": ("seconds", "about")}[config.unit]
    lines = [
        f"## How it was trained{of_adapter}",
        "",
        f"With [GreenTrainer](https://arxiv.org/abs/2309.13192), within a budget of {config.rho:g} of the {unit} of full "
        "fine-tuning per step (`rho`).",
    ]
    if config.spent:
        steps, full = config.spent["steps"], config.spent["full_steps"]
        lines[-1] += (
            f" Its {steps:,.0f} steps cost {bound} as many {unit} as {full:,.1f} steps of full fine-tuning, probes counted"
            + (f": {math.floor(100 * (1 - full / steps))} % were saved." if full < steps else ".")
        )
    lines += ["", "| changed tensors | number | weights |", "|---|---|---|"]
    lines += [f"| {kind} | {len(sizes)} | {sum(sizes):,} |" for kind, sizes in kinds.items()]
    lines += [f"| in all | {sum(map(len, kinds.values()))} | {sum(map(sum, kinds.values())):,} |"]
    if config.modules_to_save:
        lines += ["", f"Trained as a whole beside them: {', '.join(f'`{m}`' for m in config.modules_to_save)}."]
    return "\n".join(lines)
