"""How much is there to choose? What each importance of `benchmark.py` selects, next to the paper's.

    pip install -e ".[examples]"
    python examples/benchmark_selections.py --rho 0.5

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
from benchmark_run import batches_of
from benchmark_tasks import Summaries
from summarize import CACHE, DEVICE


SEED = 1


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the wheels (default: %(default)s)")
    args = parser.parse_args()
    task = Summaries(args.cache)
    print("|importance|tensors|weights, millions|lowest block|share of the paper's|")
    print("|---|---:|---:|---:|---:|")
    for metric in METRICS:
        torch.manual_seed(SEED)
        with torch.autocast(DEVICE, torch.bfloat16):
            model = build(f"{metric}-{args.rho}", task.load_model(), task, batches_of(task, SEED), lr=4e-4)
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        if metric == "one-pass":
            of_paper = sizes
        shared = sum(size for name, size in sizes.items() if name in of_paper) / sum(of_paper.values())
        lowest = min(int(block) for name in sizes for block in re.findall(r"layers\.(\d+)\.", name))
        print(f"|{metric}|{len(sizes)}|{sum(sizes.values()) / 1e6:.2f}|{lowest}|{shared:.2f}|", flush=True)


if __name__ == "__main__":
    main()
