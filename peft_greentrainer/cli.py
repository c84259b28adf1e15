"""The console script `peft-greentrainer`.

peft-greentrainer plan HuggingFaceTB/SmolLM2-135M --rho 0.5 --batch-size 4 --seq-len 512
peft-greentrainer plan config.json --exclude lm_head embed_tokens --json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence

import torch

from .plan import LORA_RANK, Memory, Plan, empty_batch, empty_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="peft-greentrainer", description="Fine-tuning within a budget of FLOPs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="what a budget buys on a model, and what it costs; needs no weights")
    plan.add_argument("model", metavar="MODEL", help="a Hub id, a folder, or a config.json")
    plan.add_argument("--rho", type=float, default=0.5, help="the budget: share of the FLOPs of full fine-tuning")
    plan.add_argument("--batch-size", type=int, default=4, help="rows of a batch")
    plan.add_argument("--seq-len", type=int, default=512, help="tokens of a row")
    plan.add_argument("--target-len", type=int, help="tokens of the labels of an encoder-decoder model")
    plan.add_argument(
        "--include", nargs="+", metavar="PATTERN", help="target_modules: names, or one regular expression"
    )
    plan.add_argument(
        "--exclude", nargs="+", metavar="PATTERN", help="exclude_modules: names, or one regular expression"
    )
    plan.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)
    options = parser.parse_args(arguments)
    # peft 0.21 asks transformers 5 under a deprecated name: nothing that a user can change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"peft-greentrainer: {error}")


def _plan(options: argparse.Namespace) -> None:
    model = empty_model(options.model)
    plan = Plan.of(
        model,
        empty_batch(model, options.batch_size, options.seq_len, options.target_len),
        options.rho,
        include=_patterns(options.include),
        exclude=_patterns(options.exclude),
        dtype=getattr(torch, options.dtype),
    )
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
        print(json.dumps({"arguments": asked, **plan.to_json()}, indent=1))
    else:
        print(f"{options.model}, batches of {options.batch_size} x {options.seq_len}, {options.dtype}\n")
        print("\n".join(_lines(plan)))


def _patterns(given: list[str] | None) -> list[str] | str | None:
    """As in the config: several names, or one regular expression."""
    if given is not None and len(given) == 1 and not re.fullmatch(r"[\w.]+", given[0]):
        return given[0]
    return given


def _lines(plan: Plan):
    full = plan.forward_flops + plan.activation_flops + plan.weight_flops
    yield f"{plan.weights / 1e6:,.1f} million weights in {plan.tensors} tensors, {plan.candidates} of them candidates"
    yield f"floor {plan.floor:.4f}: the smallest rho at which anything can be trained"
    yield ""
    yield f"{'a step of full fine-tuning':34}{'GFLOPs':>12}{'share':>9}"
    for name, flops in [
        ("forward", plan.forward_flops),
        ("activation gradients", plan.activation_flops),
        ("weight gradients", plan.weight_flops),
        ("in all", full),
    ]:
        yield f"  {name:32}{flops / 1e9:12,.1f}{flops / full:9.4f}"

    for title, groups in (("by kind", plan.kinds), ("by layer", plan.layers)):
        width = max(34, *(len(name) + 3 for name in groups))
        yield ""
        yield f"{title:{width}}{'tensors':>9}{'millions':>12}{'gradient':>11}{'from rho':>10}"
        for name, group in groups.items():
            yield (
                f"  {name:{width - 2}}{group.tensors:9}{group.weights / 1e6:12,.3f}{group.weight_flops / full:11.4f}"
                f"{group.reach:10.4f}"
            )
    yield "  gradient: share of a full step that their weight gradients cost; from rho: where the first can be trained"

    yield ""
    yield f"{'what rho buys: the most weights':34}{'tensors':>9}{'millions':>12}{'planned':>11}  down to"
    for rho, budget in plan.budgets.items():
        if budget is None:
            yield f"  {rho:<32}    under the floor"
        else:
            yield (f"  {rho:<32}{budget.tensors:9}{budget.weights / 1e6:12,.3f}{budget.ratio:11.4f}  {budget.deepest}")

    yield ""
    yield f"{'GB, activations not included':34}{'weights':>9}{'gradients':>11}{'AdamW':>8}{'in all':>8}{'FLOPs':>9}"
    ratio = plan.budgets[plan.rho].ratio if plan.budgets[plan.rho] is not None else None
    for name, memory, share in [
        ("full fine-tuning", plan.memory["full"], 1.0),
        (f"LoRA, rank {LORA_RANK}, all linear layers", plan.memory["LoRA"], plan.lora_ratio),
        (f"rho {plan.rho}, the most weights", plan.memory["rho"], ratio),
    ]:
        if memory is not None:
            yield f"  {name:32}{_gigabytes(memory)}{share:9.4f}"


def _gigabytes(memory: Memory) -> str:
    numbers = zip((9, 11, 8, 8), (memory.weights, memory.gradients, memory.optimizer, memory.total))
    return "".join(f"{value / 1e9:{width}.2f}" for width, value in numbers)
