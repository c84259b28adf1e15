"""GreenTrainer in transformers' Trainer: a config, a callback, and a file like that of any adapter.

    python examples/trainer.py

trains a small random Llama on the CPU for a few seconds, loads what was saved into a fresh base model, and prints what a
step costs next to full fine-tuning, as it was planned and as it is counted.
"""

import copy
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, flop_counter


def count_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of a forward and a backward pass."""
    with flop_counter() as counter:
        model.train()(**batch).loss.backward()
    return counter.get_total_flops()


def main() -> None:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    base = LlamaForCausalLM(config)
    ids = torch.randint(0, 256, (64, 32))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    batch = {"input_ids": ids[:4], "labels": ids[:4]}

    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.6, low_rank="only", task_type="CAUSAL_LM"))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=16,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[GreenTrainerCallback()]).train()
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)

    with torch.no_grad():
        same = torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    print(f"loaded again: outputs bit-identical to those of the trained model: {same}")
    share = count_step(model, batch) / count_step(base, batch)
    print(f"planned {model.base_model.selection.ratio:.4f} of full fine-tuning, counted {share:.4f}")


if __name__ == "__main__":
    main()
