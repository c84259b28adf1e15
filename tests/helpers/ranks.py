"""What test_distributed.py runs in every process: `torchrun ranks.py WHAT FOLDER`, with WHAT `loop`, `low-rank`, `container` or
`trainer`."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers.models import make_batch, make_model
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig


STEPS, ROWS = 7, 4


class Sent(TorchDispatchMode):
    """Counts the floating-point numbers that are sent between ranks, through whatever function of torch."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.numbers += sum(t.numel() for t in tree_leaves(args) if torch.is_tensor(t) and t.is_floating_point())
        return function(*args, **(kwargs or {}))


class Headed(nn.Module):
    """An adapted model inside of another one, which has a head of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = peft_model()
        self.head = nn.Linear(96, 2)

    @property
    def base_model(self):
        return self.encoder.base_model

    def forward(self, **batch):
        logits = self.head(self.encoder(**batch).logits)
        return SimpleNamespace(loss=logits.logsumexp(-1).square().mean())


def peft_model(**options):
    return get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, reselect=2, **options))


def data():
    """Batches of 2 * ROWS rows, one after the other."""
    batches = [make_batch("llama", rows=2 * ROWS, seed=seed) for seed in range(STEPS)]
    return [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(2 * ROWS)]


def count(sizes, bucket):
    """A communication hook: reduces as ever, and notes how much."""
    sizes[-1] += bucket.buffer().numel()
    return allreduce_hook(None, bucket)


def loop(model, wrapped, rank, ranks, sizes=None, sent=nullcontext()):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for step in range(STEPS):
        if sizes is not None:
            sizes.append(0)
        batch = make_batch("llama", rows=2 * ROWS, seed=step)
        wrapped(**{name: value[rank::ranks] for name, value in batch.items()}).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        history.append(gradients)
        with sent:
            model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    return history


def train(model, folder, batch_size):
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        save_steps=3,
        ddp_find_unused_parameters=False,
        max_grad_norm=0.0,
    )
    trainer = Trainer(model, arguments, train_dataset=data(), callbacks=[GreenTrainerCallback()])
    trainer.train()
    return trainer


def result(model):
    values = {n: p.detach() for n, p in model.named_parameters() if "greentrainer_values" in n or "head." in n}
    return {"values": values, "selected": model.base_model.peft_config["default"].selected}


def main(what, folder):
    torch.set_num_threads(1)
    model = Headed() if what == "container" else peft_model(low_rank="also" if what == "low-rank" else False, r=2)
    if what != "trainer":
        dist.init_process_group("gloo")
        with Sent() as at_wrapping:
            ddp = DistributedDataParallel(model, find_unused_parameters=False)
        sizes, sent = [], Sent()
        ddp.register_comm_hook(sizes, count)
        saved = {
            "gradients": loop(model, ddp, dist.get_rank(), dist.get_world_size(), sizes, sent),
            "reduced": sizes,
            "sent at wrapping": at_wrapping.numbers,
            "sent at selections": sent.numbers,
        }
    else:
        train(model, folder, ROWS)
        saved = {}
    torch.save(saved | result(model), f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
