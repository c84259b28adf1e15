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

from .plan import Plan, empty_batch, empty_model
from .plan_table import lines_of


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
        print("\n".join(lines_of(plan)))


def _patterns(given: list[str] | None) -> list[str] | str | None:
    """As in the config: several names, or one regular expression."""
    if given is not None and len(given) == 1 and not re.fullmatch(r"[\w.]+", given[0]):
        return given[0]
    return given
