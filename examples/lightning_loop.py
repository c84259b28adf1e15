"""GreenTrainer in a Lightning loop: `configure_optimizers` as for any model, and one call after each step.

    pip install lightning && python examples/lightning_loop.py

trains a small random Llama on the CPU, and prints what a step cost before and after the selection.
"""

from __future__ import annotations

import lightning
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from peft_greentrainer import GreenTrainerConfig, flop_counter


class Tuning(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gflops: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # What is selected later joins the groups of this optimizer, and what is deselected stays there, frozen.
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def on_train_batch_start(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.counter = flop_counter()
        self.counter.__enter__()

    def on_train_batch_end(self, outputs: object, batch: dict[str, torch.Tensor], index: int) -> None:
        self.counter.__exit__(None, None, None)
        self.gflops.append(self.counter.get_total_flops() / 1e9)
        self.model.base_model.update_and_allocate(self.global_step, self.optimizers().optimizer)


def main() -> Tuning:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    model = get_peft_model(LlamaForCausalLM(config), GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
    ids = torch.randint(0, 256, (32, 32))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    tuning = Tuning(model.train())
    trainer.fit(tuning, loader)
    selection = model.base_model.selection
    print(f"GFLOPs of each step: {', '.join(f'{g:.3f}' for g in tuning.gflops)}; the second is the probe")
    print(f"planned {selection.ratio:.4f} of full fine-tuning, counted {tuning.gflops[-1] / tuning.gflops[1]:.4f}")
    return tuning


if __name__ == "__main__":
    main()
