"""Low-rank candidates next to LoRA on the same modules: seconds of a step, size of the file; and the memory of a probe.

    python examples/benchmarks/benchmark_low_rank.py             # a 135M Llama of random weights, 4 x 160 tokens
    python examples/benchmarks/benchmark_low_rank.py --device cuda --batch-size 16 --seq-len 512

Every rho has a model of its own, which one probe has selected for, and a LoRA of rank 8 on the linear modules that were
selected. Steps are taken in turn, and medians compared. What is trained besides, norms, costs our side extra.
"""

import argparse
import copy
import json
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from benchmark_step import Loop, make_model, peak_bytes, seconds, time_selection_of_70b
from memory import keep_freed_memory
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig


RANK = 8


def file_size(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def pair_of_loops(base: nn.Module, batch: dict[str, torch.Tensor], rho: float) -> dict[str, Loop]:
    """A model with low-rank candidates after its first selection, and LoRA on the modules that were selected."""
    config = GreenTrainerConfig(rho=rho, low_rank="only", r=RANK, reselect="once")
    ours = Loop(get_peft_model(copy.deepcopy(base), config), batch)
    while ours.model.base_model.selection is None:
        ours.budgeted_step()
    modules = [name.removesuffix(".weight") for name in ours.model.base_model.selection.low_rank]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules)
    return {"low-rank": ours, "LoRA": Loop(get_peft_model(copy.deepcopy(base), lora), batch)}


def peaks_of_probes(base: nn.Module, batch: dict[str, torch.Tensor], rho: float, device: str) -> dict[str, int]:
    """Bytes that forward and backward of a probe allocate at most, where whole tensors are candidates and where not."""
    peaks = {}
    for low_rank in (False, "also", "only"):
        config = GreenTrainerConfig(rho=rho, low_rank=low_rank, r=RANK)
        loop = Loop(get_peft_model(copy.deepcopy(base), config), batch)
        loop.budgeted_step()
        peaks[f"low_rank={low_rank!r}"] = peak_bytes(loop.backward, device)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=160)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    keep_freed_memory()

    base = make_model(args)
    ids = torch.randint(0, 49152, (args.batch_size, args.seq_len), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    print(
        f"{'rho':>5}{'modules':>9}{'low-rank':>10}{'LoRA':>8}{'ratio':>7}   seconds of a step, medians of {args.rounds}"
    )
    rows = []
    for rho in args.rho:
        loops = pair_of_loops(base, batch, rho)
        taken = defaultdict(list)
        order = list(loops)
        for _ in range(args.rounds + 1):
            order.reverse()
            for kind in order:
                taken[kind].append(seconds(loops[kind].step, args.device))
        medians = {kind: median(times[1:]) for kind, times in taken.items()}
        bytes_of = {kind: file_size(loop.model) for kind, loop in loops.items()}
        modules = len(loops["low-rank"].model.base_model.selection.low_rank)
        ratio = medians["low-rank"] / medians["LoRA"]
        print(f"{rho:5}{modules:9}{medians['low-rank']:10.3f}{medians['LoRA']:8.3f}{ratio:7.3f}")
        rows.append({"rho": rho, "modules": modules, "seconds": medians, "bytes": bytes_of})
    for row in rows:
        ours, theirs = row["bytes"]["low-rank"], row["bytes"]["LoRA"]
        print(f"rho {row['rho']}: file of {ours:,} bytes, LoRA's {theirs:,}: {ours / theirs:.3f}")
    peaks = peaks_of_probes(base, batch, args.rho[0], args.device)
    for kind, peak in peaks.items():
        print(f"peak memory of a probe, {kind}: {peak / 2**20:.1f} MiB")
    _, candidates, milliseconds = time_selection_of_70b(r=RANK)
    print(f"select from the {candidates} candidates of a 70B Llama: {milliseconds:.1f} ms")
    measured = {"rows": rows, "probe_bytes": peaks, "select_ms": milliseconds}
    print(json.dumps({"arguments": vars(args), "torch": torch.__version__, **measured}))


if __name__ == "__main__":
    main()
