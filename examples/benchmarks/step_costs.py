"""What a step of training costs next to one of full fine-tuning: FLOPs planned and counted, seconds, megabytes on disk.

>>> compare_costs(model, load_base(model_name), batch, args)        # prints the last table of `summarize.py`
"""

import time
from argparse import Namespace
from statistics import median

import torch
from torch import Tensor, nn

from peft_greentrainer import flop_counter, profile


TIMED_STEPS = 5


def measure_steps(models: dict[str, nn.Module], batch: dict[str, Tensor], lr: float) -> dict[str, dict[str, float]]:
    """Count the FLOPs of a step of every model, and time steps of all of them in turn, on the same batch."""
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=lr, fused=True) for name, parameters in trained.items()}

    def seconds_of_step(name: str) -> float:
        start = time.perf_counter()
        models[name].train()(**batch).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    flops = {}
    for name in models:
        # The first step also allocates the state of the optimizer, so it is counted and not timed.
        with flop_counter() as counter:
            seconds_of_step(name)
        flops[name] = counter.get_total_flops() / 1e9
    rounds = [{name: seconds_of_step(name) for name in models} for _ in range(TIMED_STEPS)]
    return {
        "GFLOPs of a step, counted": flops,
        "seconds of a step, median": {name: median(seconds[name] for seconds in rounds) for name in models},
        "trained tensors": {name: len(parameters) for name, parameters in trained.items()},
        "trained weights, millions": {name: sum(p.numel() for p in trained[name]) / 1e6 for name in models},
    }


def print_table(columns: list[str], rows: dict[str, dict[str, float]]) -> None:
    print("".join(["\n", " " * 28, *(f"{column:>14}" for column in columns)]))
    for label, values in rows.items():
        cells = [f"{values[column]:,.4g}" if column in values else "" for column in columns]
        print("".join([f"{label:28}", *(f"{cell:>14}" for cell in cells)]))


def compare_costs(model: nn.Module, full: nn.Module, batch: dict[str, Tensor], args: Namespace) -> None:
    """Print what a step costs next to one of `full`, the untrained base. The steps that are timed move the weights."""
    print("Timing steps ...", flush=True)
    graph = profile(full, batch, r=8 if args.low_rank else None)
    planned = {"full": graph.full_flops / 1e9}
    if args.method == "greentrainer":
        planned[args.method] = graph.flops(model.peft_config["default"].selected) / 1e9
    megabytes = {"full": sum(p.nbytes for p in full.parameters()) / 1e6}
    megabytes[args.method] = sum(file.stat().st_size for file in args.out.glob("*.safetensors")) / 1e6
    costs = {
        "GFLOPs of a step, planned": planned,
        **measure_steps({"full": full, args.method: model}, batch, args.lr),
        "megabytes on disk": megabytes,
    }
    if args.method == "greentrainer" and args.unit == "seconds":
        costs["seconds of a step, planned"] = {"share": model.base_model.selection.ratio}
    for values in costs.values():
        if args.method in values:
            values["share"] = values[args.method] / values["full"]
    print_table(["full"] if args.method == "full" else ["full", args.method, "share"], costs)
