"""How much is there to choose? What each importance of `benchmark.py` selects, next to the paper's.

    pip install -e ".[examples]"
    python examples/benchmarks/benchmark_selections.py --rho 0.5

For the main job's model and data, from the first batches of one seed: a table in markdown with the number of selected tensors
and their weights, the lowest of the 30 blocks that is trained, and how many of the weights that the paper's importance
selects are selected too.
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from benchmark_importance import METRICS
from benchmark_methods import build
from benchmark_report import print_markdown
from benchmark_run import batches_of
from benchmark_tasks import Summaries
from main_job import CACHE, DEVICE


SEED = 1


def selected_sizes(metric: str, rho: float, task: Summaries) -> dict[str, int]:
    """Numbers in each tensor that the importance selects."""
    torch.manual_seed(SEED)
    with torch.autocast(DEVICE, torch.bfloat16):
        model = build(f"{metric}-{rho}", task.load_model(), task, batches_of(task, SEED), lr=4e-4)
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the wheels (default: %(default)s)")
    args = parser.parse_args()
    task = Summaries(args.cache)
    selections = {metric: selected_sizes(metric, args.rho, task) for metric in METRICS}
    of_paper = selections["one-pass"]
    rows = []
    for metric, sizes in selections.items():
        lowest = min(int(block) for name in sizes for block in re.findall(r"layers\.(\d+)\.", name))
        shared = sum(size for name, size in of_paper.items() if name in sizes) / sum(of_paper.values())
        rows.append([metric, str(len(sizes)), f"{sum(sizes.values()) / 1e6:.2f}", str(lowest), f"{shared:.2f}"])
    print_markdown(["importance", "tensors", "weights, millions", "lowest block", "share of the paper's"], rows)


if __name__ == "__main__":
    main()
