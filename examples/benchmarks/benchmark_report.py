"""Tables and plots of what `benchmark.py` has measured.

    pip install -e ".[examples]"
    python examples/benchmarks/benchmark_report.py               # of examples/benchmarks/results/benchmark.jsonl
    python examples/benchmarks/benchmark_report.py other.jsonl

Prints in markdown, for every task and comparison: the loss and the last score of each method at each budget, best loss
first, then a table for each budget with all that was measured. Each number is a mean over seeds, with the standard
deviation. Saves, next to the JSON lines, a plot of the loss over FLOPs for every task and comparison.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


RESULTS = Path(__file__).with_name("results") / "benchmark.jsonl"


def grouped(lines: list[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for line in lines:
        groups[tuple(line[key] for key in keys)].append(line)
    return groups


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return fmean(run[key] for run in runs)


def with_spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def print_markdown(columns: list[str], rows: Iterable[list[str]]) -> None:
    for row in [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]:
        print("|".join(["", *row, ""]))


def print_summary(runs: list[dict[str, Any]]) -> None:
    budgets = sorted({run["budget"] for run in runs})
    first, *_, last = runs[0]["test"]
    scores = [first, last]
    columns = ["method", *(f"{score}, {budget}" for score in scores for budget in budgets)]
    rows = []
    for (method,), of_method in grouped(runs, "method").items():
        at = grouped(of_method, "budget")
        tests = {
            score: [[run["test"][score] for run in at.get((budget,), [])] for budget in budgets] for score in scores
        }
        order = [fmean(losses) if losses else float("inf") for losses in reversed(tests["loss"])]
        cells = [with_spread(values) if values else "" for of_score in tests.values() for values in of_score]
        rows.append((order, [method, *cells]))
    print_markdown(columns, [cells for _, cells in sorted(rows)])


def print_table(runs: list[dict[str, Any]]) -> None:
    scores = list(runs[0]["test"])
    columns = ["method", "lr", "runs", "steps", "FLOPs", "seconds", *scores, "file MB", "memory MB"]
    rows = []
    for (method, lr), of_method in grouped(runs, "method", "lr").items():
        cells = [
            method,
            f"{lr:g}",
            str(len(of_method)),
            f"{mean(of_method, 'steps'):.0f}",
            f"{mean(of_method, 'flops_over_full_step'):.2f}",
            f"{mean(of_method, 'seconds'):.1f}",
            *(with_spread([run["test"][score] for run in of_method]) for score in scores),
            f"{mean(of_method, 'file_bytes') / 1e6:.1f}",
            f"{mean(of_method, 'peak_memory') / 1e6:,.0f}",
        ]
        rows.append((fmean(run["test"]["loss"] for run in of_method), cells))
    print_markdown(columns, [cells for _, cells in sorted(rows)])


def plot_losses(title: str, runs: list[dict[str, Any]], file: Path) -> None:
    pyplot.figure(figsize=(8, 6))
    for (method,), of_method in grouped(runs, "method").items():
        points = []
        for of_point in grouped(of_method, "budget").values():
            losses = [run["test"]["loss"] for run in of_point]
            spread = stdev(losses) if len(losses) > 1 else 0
            points.append((mean(of_point, "flops_over_full_step"), fmean(losses), spread))
        flops, losses, spreads = zip(*sorted(points))
        pyplot.errorbar(flops, losses, spreads, marker="o", capsize=3, label=method)
    pyplot.title(title)
    pyplot.xlabel("total FLOPs, in steps of full fine-tuning")
    pyplot.ylabel("test loss")
    pyplot.legend()
    pyplot.grid(alpha=0.3)
    pyplot.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    lines = [json.loads(line) for line in results.open()]
    runs = [line for line in lines if "test" in line]
    keys = ("task", "comparison", "precision", "device")
    for (task, comparison, precision, device), of_kind in sorted(grouped(runs, *keys).items()):
        title = f"{task}: equal {comparison} ({precision}, {device})"
        print(f"\n# {title}\n")
        print_summary(of_kind)
        for (budget,), of_table in sorted(grouped(of_kind, "budget").items()):
            print(f"\n## {title}: those of {budget} full steps\n")
            print_table(of_table)
        name = f"{results.stem}-{task}-{comparison}-{precision}-{device}.png".replace(" ", "-")
        plot_losses(title, of_kind, results.with_name(name))


if __name__ == "__main__":
    main()
