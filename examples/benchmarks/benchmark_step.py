"""What a training step costs in seconds and memory: full fine-tuning, a budgeted step, a probe, and the wrapper itself.

    python examples/benchmarks/benchmark_step.py           # a 135M Llama of random weights, 4 x 160 tokens, float32
    python examples/benchmarks/benchmark_step.py --dtype bfloat16 --device cuda --batch-size 16 --seq-len 512

All kinds of step run in turn, in one process, and medians are compared: timings of separate runs are not comparable on a
busy machine. What is recorded rides on a step of full fine-tuning; `profile` is a pass of its own. Peaks of memory are those
of the allocator over one forward and backward pass, weights not counted.
"""

import argparse
import copy
import gc
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from memory import keep_freed_memory
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import LlamaConfig, LlamaForCausalLM

from peft_greentrainer import CostGraph, GreenTrainerConfig, profile, select
from peft_greentrainer.adapter.candidates import Candidates
from peft_greentrainer.adapter.model_tensors import find_tensors, named_modules
from peft_greentrainer.adapter.values import fingerprint_of
from peft_greentrainer.measuring.recorder import CostRecorder


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def make_model(args: argparse.Namespace) -> nn.Module:
    # The shape of SmolLM2-135M; seconds do not depend on the weights.
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Loop:
    """One model with its optimizer; `step()` is one step of a plain training loop."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(trainable(model), lr=1e-5)
        self.steps = 0

    def backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def recorded_backward(self) -> None:
        recorder = CostRecorder()
        names = dict(self.model.named_parameters())
        hooks = [p.register_hook(partial(recorder.operations.mark, name)) for name, p in names.items()]
        with recorder.forward():
            loss = self.model(**self.batch).loss
        with recorder.backward():
            loss.backward()
        for hook in hooks:
            hook.remove()
        recorder.operations.graph(names)

    def recorded_step(self) -> None:
        self.recorded_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def budgeted_step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.steps, self.optimizer)
        self.optimizer.zero_grad()
        self.steps += 1


def seconds(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """The most memory that was allocated during `run` beyond what was before."""
    gc.collect()  # models of before, freed meanwhile, would be subtracted
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def time_steps(args: argparse.Namespace, base: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    full = Loop(copy.deepcopy(base), batch)
    # With reselect=2 every second step is a probe.
    wrapped = Loop(get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=args.rho, reselect=2)), batch)
    wrapped.budgeted_step()
    wrapped.budgeted_step()
    selected = set(wrapped.model.base_model.selection.tensors)

    same = copy.deepcopy(base)
    for name, parameter in same.named_parameters():
        parameter.requires_grad_(name in selected)
    bare = Loop(same, batch)
    frozen = Loop(get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=args.rho, reselect="once")), batch)
    frozen.budgeted_step()
    frozen.budgeted_step()

    taken = defaultdict(list)
    for _ in range(args.rounds + 1):
        taken["full"].append(seconds(full.step, args.device))
        taken["full, recorded"].append(seconds(full.recorded_step, args.device))
        wrapped.budgeted_step()
        taken["probe"].append(seconds(wrapped.budgeted_step, args.device))
        taken["profile"].append(seconds(lambda: profile(full.model, batch), args.device))
    assert selected == set(frozen.model.base_model.selection.tensors)
    pair = [("bare", bare), ("wrapped", frozen)]
    for _ in range(3 * args.rounds):  # the difference to be seen is small, so more of them, and each first in its turn
        pair.reverse()
        for kind, loop in pair:
            taken[kind].append(seconds(loop.step, args.device))
    return {kind: median(times[1:]) for kind, times in taken.items()}


def measure_memory(args: argparse.Namespace, base: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    peaks = {}
    full = copy.deepcopy(base)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in full.parameters()]
    peaks["full, no gradients kept"] = peak_bytes(Loop(full, batch).backward, args.device)
    for hook in hooks:
        hook.remove()
    peaks["full"] = peak_bytes(Loop(full, batch).backward, args.device)
    full.zero_grad()
    peaks["full, recorded"] = peak_bytes(Loop(full, batch).recorded_backward, args.device)
    del full
    for rows in (None, 1):
        config = GreenTrainerConfig(rho=args.rho, probe_batch_size=rows)
        loop = Loop(get_peft_model(copy.deepcopy(base), config), batch)
        loop.budgeted_step()
        peaks["probe" if rows is None else "probe of 1 row"] = peak_bytes(loop.backward, args.device)
        loop.optimizer.step()
        loop.model.base_model.update_and_allocate(1, loop.optimizer)
        loop.optimizer.zero_grad()
    peaks["budgeted"] = peak_bytes(loop.backward, args.device)
    return peaks


def time_selection(tensors: int = 1000, rounds: int = 9) -> float:
    """Milliseconds to select from so many tensors in a row, with heavy-tailed importances."""
    random = np.random.default_rng(0)
    ones = np.ones((tensors, tensors), dtype=bool)
    needs = np.concatenate([np.triu(ones, 1), np.eye(tensors, dtype=bool)], axis=1)
    costs = random.integers(1, 10**9, 2 * tensors)
    forward_flops = int(costs[tensors:].sum())
    graph = CostGraph(
        tuple(map(str, range(tensors))), forward_flops, forward_flops + int(costs[1:].sum()), costs, needs
    )
    importance = dict(zip(graph.tensors, random.lognormal(0, 2, tensors).tolist()))
    return 1e3 * median(
        seconds(lambda: select(graph, importance, rho), "cpu") for rho in np.linspace(0.4, 0.9, rounds)
    )


def time_selection_of_70b(rounds: int = 6, r: int | None = None) -> tuple[float, int, float]:
    """A 70B Llama on the meta device: seconds to profile it, its candidates, and milliseconds to select from them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_70B))
        ids = torch.zeros(4, 512, dtype=torch.long)
    start = time.perf_counter()
    graph = profile(model, {"input_ids": ids, "labels": ids}, r=r)
    profiling = time.perf_counter() - start
    importance = dict(zip(graph.tensors, np.random.default_rng(0).lognormal(0, 2, len(graph.tensors)).tolist()))
    taken = [seconds(lambda: select(graph, importance, rho), "cpu") for rho in np.linspace(0.4, 0.9, rounds)]
    return profiling, len(graph.tensors), 1e3 * median(taken)


def time_fingerprints_of_7b() -> float:
    """Seconds to take the fingerprints of every tensor of a 7B Llama in bfloat16; its memory is never written."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B)).bfloat16()
    model.to_empty(device="cpu")
    config = GreenTrainerConfig()
    start = time.perf_counter()
    candidates, modules = Candidates.of(find_tensors(model), config), named_modules(model)
    prints = [fingerprint_of(name, candidates, modules) for name in candidates.names]
    assert len(prints) == 291
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=160)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    keep_freed_memory()

    base = make_model(args)
    ids = torch.randint(0, 49152, (args.batch_size, args.seq_len), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    time_of = time_steps(args, base, batch)
    peaks = measure_memory(args, base, batch)
    selecting = time_selection()
    profiling_70b, _, selecting_70b = time_selection_of_70b()
    prints_7b = time_fingerprints_of_7b()

    print(f"{'seconds':32} median of {args.rounds}")
    for kind, taken in time_of.items():
        print(f"  {kind:30} {taken:8.3f}   {taken / time_of['full']:5.2f} of full")
    print(f"  {'wrapped / bare':30} {time_of['wrapped'] / time_of['bare']:8.3f}")
    print(f"  {'recording, on top of full':30} {time_of['full, recorded'] / time_of['full'] - 1:8.3f}   of full")
    print(f"  {'profile of a 70B Llama, meta':30} {profiling_70b:8.3f}")
    print(f"  {'select from its 723 tensors':30} {selecting_70b:8.1f} ms")
    print(f"  {'select, chain of 1000 tensors':30} {selecting:8.1f} ms")
    print(f"  {'fingerprints of a 7B Llama':30} {prints_7b:8.3f}")
    print("peak memory of forward and backward")
    for kind, peak in peaks.items():
        print(f"  {kind:30} {peak / 2**20:8.1f} MiB")
    print(f"  {'full, recorded / full':30} {peaks['full, recorded'] / peaks['full']:8.3f}")
    print(f"  {'probe / full, none kept':30} {peaks['probe'] / peaks['full, no gradients kept']:8.3f}")
    print(f"  {'probe of 1 row / budgeted':30} {peaks['probe of 1 row'] / peaks['budgeted']:8.3f}")
    print(
        json.dumps(
            {
                "arguments": vars(args),
                "torch": torch.__version__,
                "seconds": time_of,
                "select_ms": selecting,
                "profile_70b": profiling_70b,
                "select_70b_ms": selecting_70b,
                "bytes": peaks,
            }
        )
    )


if __name__ == "__main__":
    main()
