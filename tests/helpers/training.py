"""Training for tests: a few steps with a selection made by hand, and a Trainer that counts."""

from functools import partial

import torch
from helpers.models import make_batch

from peft_greentrainer import flop_counter
from peft_greentrainer.adapter.values import candidates, set_selection, set_values


def outputs(model, kind):
    model.eval()
    batch = make_batch(kind)
    with torch.no_grad():
        output = model(**batch)
    return output["logits"]


def train_a_little(
    model, kind, tensors=None, steps=2, make_optimizer=partial(torch.optim.AdamW, lr=1e-2), adapter="default"
):
    """Train these tensors (default: every second candidate) for a few steps, with a selection made by hand."""
    base = model.get_base_model()
    if tensors is None:
        tensors = sorted(candidates(base, model.peft_config[adapter]))[::2]
    set_values(base, adapter, tensors)
    set_selection(base, adapter, tensors)
    model.train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        output = model(**make_batch(kind, seed=step))
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors


def counting(trainer_cls):
    """The same Trainer, noting the FLOPs of each step."""

    class Counting(trainer_cls):
        def training_step(self, *args, **kwargs):
            with flop_counter() as counter:
                loss = super().training_step(*args, **kwargs)
            self.flops = [*getattr(self, "flops", []), counter.get_total_flops()]
            return loss

    return Counting
