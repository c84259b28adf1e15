"""The plain loop of the README, for the tests."""

import torch
from helpers.models import make_batch


class Loop:
    """The plain loop of the README, one step at a time."""

    def __init__(self, model, kind="llama", make_optimizer=None):
        self.model, self.kind = model, kind
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(trainable) if make_optimizer else torch.optim.AdamW(trainable, lr=1e-2)
        self.steps = 0

    def step(self, batch=None, epoch=None):
        output = self.model(**(batch or make_batch(self.kind, seed=self.steps)))
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.steps, self.optimizer, epoch=epoch)
        self.optimizer.zero_grad()
        self.steps += 1

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    @property
    def selection(self):
        return self.model.base_model.selection
