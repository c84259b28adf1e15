"""One run of `benchmark.py`, in a process of its own, so that its peak memory is its own: a JSON job in, a JSON line out.

    python examples/benchmarks/benchmark_run.py '{"kind": "calibration", "task": "summaries", "method": "lora", \\
        "unit": "flops", "precision": "bfloat16"}' --cache DIR --results FILE

A calibration measures what steps of a method cost next to those of full fine-tuning on the same batches. A run trains,
as many steps as its budget pays for, and scores what came out.
"""

import json
import math
import random
import resource
import tempfile
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from benchmark_methods import build
from benchmark_tasks import TASKS
from main_job import DEVICE
from memory import keep_freed_memory
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from peft_greentrainer import GreenTrainerModel, flop_counter


# The first steps are for what a method spends once: a profile, or a provisional selection and a probe.
STEPS_BEFORE = 3
TIMED_STEPS = 21


class Training:
    """A plain loop, the same for every method: AdamW, and a learning rate that decays linearly to zero."""

    def __init__(self, task: Any, method: str, lr: float, seed: int, steps: int, precision: str) -> None:
        self.task, self.precision = task, precision
        self.batches = batches_of(task, seed)
        torch.manual_seed(seed)
        model = task.load_model()
        # What a method measures before its first step is part of what it costs.
        self.flops, self.seconds = 0, 0.0
        with flop_counter() as counter, self.autocast():
            start = now()
            self.model = build(method, model, task, batches_of(task, seed), lr)
            self.seconds += now() - start
        self.flops += counter.get_total_flops()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.steps, self.lengths = 0, []
        self.model.train()

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.precision == "bfloat16")

    def step(self) -> None:
        batch = next(self.batches)
        start = now()
        # One context for each pass: it keeps the weights that it has cast.
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        if isinstance(self.model.base_model, GreenTrainerModel):
            epoch = self.steps // (len(self.task.training) // self.task.batch_size)
            self.model.base_model.update_and_allocate(self.steps, self.optimizer, epoch=epoch)
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds += now() - start
        self.steps += 1
        self.lengths.append(batch["input_ids"].shape[1])

    def counted_step(self) -> None:
        with flop_counter() as counter:
            self.step()
        self.flops += counter.get_total_flops()


def batches_of(task: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the training split, epoch after epoch, all of the same number of rows."""
    shuffler = random.Random(seed)
    while True:
        examples = shuffler.sample(task.training, len(task.training))
        for i in range(0, len(examples) - task.batch_size + 1, task.batch_size):
            yield task.batch(examples[i : i + task.batch_size])


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def calibrate(job: dict[str, Any], task: Any) -> dict[str, float]:
    """What a step of a method costs and what it spends once, both in steps of full fine-tuning, taken in turn with it."""
    # The first step of a process is slow, whichever method takes it, so one is taken before.
    Training(task, "full", 1e-5, 0, 10**6, job["precision"]).step()
    methods = {"full": "full", "method": job["method"]}
    trainings = {kind: Training(task, name, 1e-5, 0, 10**6, job["precision"]) for kind, name in methods.items()}
    once = getattr(trainings["method"], job["unit"])
    costs = {kind: [] for kind in trainings}
    for _ in range(STEPS_BEFORE + (TIMED_STEPS if job["unit"] == "seconds" else 1)):
        for kind, training in trainings.items():
            before = getattr(training, job["unit"])
            training.step() if job["unit"] == "seconds" else training.counted_step()
            costs[kind].append(getattr(training, job["unit"]) - before)
    step = median(m / f for m, f in zip(costs["method"][STEPS_BEFORE:], costs["full"][STEPS_BEFORE:]))
    # The first step of a training is slow for both, so a ratio of first steps is an overhead and their seconds are not.
    first = sum(m / f - step for m, f in zip(costs["method"], costs["full"][:STEPS_BEFORE]))
    return {"step": step, "overhead": once / costs["full"][0] + first, "costs": costs}


def measure_full(job: dict[str, Any], task: Any) -> dict[str, list[int]]:
    """FLOPs of a step of full fine-tuning at three lengths, which tell those at any: they are quadratic in the length."""
    model, lengths, flops = task.load_model(), [16, 32, 64], []
    labels = {"CAUSAL_LM": lambda tokens: tokens, "SEQ_CLS": lambda tokens: tokens[:, 0]}[task.task_type]
    for length in lengths:
        tokens = torch.zeros(task.batch_size, length, dtype=torch.long, device=DEVICE)
        with flop_counter() as counter:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=job["precision"] == "bfloat16"):
                loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels(tokens)).loss
            loss.backward()
        flops.append(counter.get_total_flops())
    return {"lengths": lengths, "flops": flops}


def run(
    job: dict[str, Any], task: Any, step: float, overhead: float, lengths: list[int], flops: list[int]
) -> dict[str, Any]:
    """Train and score. `step` and `overhead` are of a calibration; `lengths` and `flops` are of `measure_full`."""
    steps = math.floor((job["budget"] - overhead) / step)
    training = Training(task, job["method"], job["lr"], job["seed"], steps, job["precision"])
    for _ in range(steps):
        training.counted_step()
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    full_step = fmean(np.polyval(np.polyfit(lengths, flops, 2), training.lengths))
    measured = {
        "steps": steps,
        "flops": training.flops,
        "flops_over_full_step": training.flops / full_step,
        "seconds": training.seconds,
        "peak_memory": peak,
        "file_bytes": file_size(training.model),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }
    model = training.model.merge_and_unload() if isinstance(training.model, PeftModel) else training.model
    model.eval().requires_grad_(True)  # autocast casts what is frozen anew for every token
    with training.autocast():
        measured["validation_loss"] = task.validation_loss(model)
        if job["comparison"] != "tune":
            measured["test"] = task.test_scores(model)
    return measured


def file_size(model: nn.Module) -> int:
    """Bytes of the file that holds what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder)
        else:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, Path(folder, "model.safetensors"))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("job", type=json.loads)
    parser.add_argument("--costs", type=json.loads, help="what `benchmark.py` has measured before")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    task = TASKS[args.job["task"]](args.cache)
    if args.job["kind"] == "run":
        measured = run(args.job, task, **args.costs)
    else:
        measured = {"full": measure_full, "calibration": calibrate}[args.job["kind"]](args.job, task)
    with args.results.open("a") as results:
        results.write(json.dumps({**args.job, **measured}) + "\n")


if __name__ == "__main__":
    main()
