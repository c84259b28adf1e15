"""What does a budget buy? Methods of fine-tuning at equal FLOPs, equal steps or equal seconds, with their own learning rates.

    pip install -e ".[examples]"
    python examples/benchmarks/benchmark.py --task summaries --comparison flops --budgets 15 30 60
    python examples/benchmarks/benchmark.py --task sentences --methods full lora greentrainer-0.5 --seeds 1
    python examples/benchmarks/benchmark_report.py
    python examples/benchmarks/benchmark.py --comparison steps --budgets 40 --lr 4e-4 \\
        --results examples/benchmarks/results/ablation.jsonl --methods one-pass-0.5 one-pass-4-batches-0.5 \\
        one-pass-16-batches-0.5 two-pass-0.5 cross-batch-0.5 squared-0.5 fisher-0.5 snip-0.5 magnitude-0.5 random-0.5

A budget is what so many steps of full fine-tuning cost, with everything that a method spends on probes and profiles. At
every budget the learning rate of a method is the best on the validation split at equal FLOPs, with seeds that the
comparisons do not use. Every run appends a line to a file of JSON lines; what is there already is not run again, so the
command goes on where it was stopped. The runs themselves, and what their lines say, are in `benchmark_run.py`.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from benchmark_methods import learning_rates
from main_job import CACHE


RUN = Path(__file__).with_name("benchmark_run.py")
RESULTS = Path(__file__).with_name("results") / "benchmark.jsonl"
TUNING_SEEDS = [0, 4]
# By how much the validation losses of two seeds differ, about.
SEED_NOISE = 0.02
RHOS = [0.5, 0.6, 0.7]
# Two thirds of the blocks, half, and one third.
BLOCKS = {"summaries": [20, 15, 10], "sentences": [4, 3, 2]}


def all_methods(task: str) -> list[str]:
    by_blocks = [f"{kind}-{blocks}" for kind in ("lora-last", "freeze") for blocks in BLOCKS[task]]
    by_rho = [f"{kind}-{rho}" for kind in ("random", "greentrainer", "low-rank", "both") for rho in RHOS]
    return ["full", "lora", *by_blocks, *by_rho]


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=BLOCKS, default="summaries", help="default: %(default)s")
    add("--comparison", choices=["flops", "steps", "seconds"], default="flops", help="what is equal (default: flops)")
    add("--budgets", type=int, nargs="+", default=[15, 30, 60], help="in steps of full fine-tuning")
    add("--methods", nargs="+", help=f"default: {' '.join(all_methods('summaries'))}")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add("--lr", type=float, help="learning rate of all methods (default: the best of each)")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of autocast; float32: without it")
    add("--cache", type=Path, default=CACHE, help="folder for the wheels (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="file of JSON lines (default: %(default)s)")
    args = parser.parse_args()
    args.methods = args.methods or all_methods(args.task)
    return args


def result_of(job: dict[str, Any], args: Namespace, **costs: Any) -> dict[str, Any]:
    """The line of a job, which is run if there is none yet."""
    job = {**job, "task": args.task, "precision": args.precision}
    while True:
        lines = [json.loads(line) for line in args.results.open()] if args.results.exists() else []
        for line in lines:
            if job.items() <= line.items():
                return line
        print(" ".join(map(str, job.values())), flush=True)
        options = ["--costs", json.dumps(costs), "--cache", args.cache, "--results", args.results]
        subprocess.run([sys.executable, RUN, json.dumps(job), *options], check=True)


def run(method: str, comparison: str, budget: int, lr: float, seed: int, args: Namespace) -> dict[str, Any]:
    full = result_of({"kind": "full"}, args)
    costs = {"step": 1, "overhead": 0}
    if comparison != "steps" and method != "full":
        unit = "seconds" if comparison == "seconds" else "flops"
        costs = result_of({"kind": "calibration", "method": method, "unit": unit}, args)
    job = {"kind": "run", "method": method, "comparison": comparison, "budget": budget, "lr": lr, "seed": seed}
    return result_of(
        job, args, step=costs["step"], overhead=costs["overhead"], lengths=full["lengths"], flops=full["flops"]
    )


def best_learning_rate(method: str, budget: int, args: Namespace) -> float:
    """The best of the learning rates of a method, and of more of them if it is the first or the last.

    One seed finds the two best, and what is as good but for noise; more seeds decide between them: near the highest rate
    that works, seeds differ by more than rates do.
    """

    def loss(lr: float, seed: int) -> float:
        return run(method, "tune", budget, lr, seed, args)["validation_loss"]

    first, *others = TUNING_SEEDS
    losses = {lr: loss(lr, first) for lr in learning_rates(method)}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
        lr = best / 2 if best == min(losses) else best * 2
        losses[lr] = loss(lr, first)
    second = sorted(losses.values())[1]
    finalists = [lr for lr, of_lr in losses.items() if of_lr <= max(second, losses[best] + SEED_NOISE)]
    return min(finalists, key=lambda lr: losses[lr] + sum(loss(lr, seed) for seed in others))


def main() -> None:
    args = parse_arguments()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for budget in args.budgets:
        for method in args.methods:
            lr = args.lr or best_learning_rate(method, budget, args)
            for seed in args.seeds:
                run(method, args.comparison, budget, lr, seed, args)


if __name__ == "__main__":
    main()
