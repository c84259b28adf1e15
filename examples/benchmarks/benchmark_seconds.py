"""Does a budget in seconds hold? The main job, planned at several rho, and timed next to full fine-tuning.

    python examples/benchmarks/benchmark_seconds.py
    python examples/benchmarks/benchmark_seconds.py --unit flops    # what the seconds are if the budget is in FLOPs

Every rho has a model of its own, which is planned by a probe in a plain loop. Then steps of all models and of full
fine-tuning are taken in turn, on the same batches, and medians are compared.
"""

import argparse
import json
import random
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from main_job import DEVICE, Batches, default_model, default_pairs, load_base
from memory import keep_freed_memory
from peft import get_peft_model

from peft_greentrainer import GreenTrainerConfig


class Loop:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        self.steps = 0

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        if hasattr(self.model, "peft_config"):
            self.model.base_model.update_and_allocate(self.steps, self.optimizer)
        self.optimizer.zero_grad()
        self.steps += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", choices=["seconds", "flops"], default="seconds")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-greentrainer")
    parser.add_argument("--as-the-system-does", action="store_true", help="let the C library give memory back")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not args.as_the_system_does:
        keep_freed_memory()

    name = default_model(args.cache)
    training, _ = default_pairs(args.cache)
    random.Random(0).shuffle(training)
    batches = Batches(name, max_length=160, truncation_side="left")

    def batch(i: int) -> dict[str, torch.Tensor]:
        return batches.for_training(training[i * args.batch_size : (i + 1) * args.batch_size])

    full = Loop(load_base(name).train())
    loops, planned = {}, {}
    for rho in args.rho:
        config = GreenTrainerConfig(rho=rho, unit=args.unit, reselect="once")
        loop = loops[rho] = Loop(get_peft_model(load_base(name), config).train())
        loop.step(batch(0))
        loop.step(batch(1))  # the probe
        planned[rho] = loop.model.base_model.selection.ratio

    taken = defaultdict(list)
    for i in range(args.rounds + 1):
        taken["full"].append(full.step(batch(2 + i)))
        for rho, loop in loops.items():
            taken[rho].append(loop.step(batch(2 + i)))
    medians = {kind: median(times[1:]) for kind, times in taken.items()}

    print(f"full fine-tuning: {medians['full']:.3f} seconds a step, median of {args.rounds}")
    print(f"{'rho':>5}{'planned':>10}{'measured':>10}{'off by':>9}   shares of {args.unit}, and of measured seconds")
    rows = []
    for rho in args.rho:
        measured = medians[rho] / medians["full"]
        rows.append({"rho": rho, "planned": planned[rho], "measured": measured})
        print(f"{rho:5}{planned[rho]:10.4f}{measured:10.4f}{measured / planned[rho] - 1:+9.1%}")
    print(json.dumps({"unit": args.unit, "torch": torch.__version__, "full_seconds": medians["full"], "rows": rows}))


if __name__ == "__main__":
    main()
