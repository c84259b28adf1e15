"""GreenTrainer in a plain loop: one call after each step of the optimizer, as peft has it for methods that adapt.

    python examples/plain_loop.py

trains a small random Llama on the CPU for a few seconds. It prints what each step costs next to full fine-tuning: first a
provisional selection is trained, then come two steps that probe, then the selection, which costs what was planned.
"""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_greentrainer import GreenTrainerConfig, flop_counter


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    base = LlamaForCausalLM(config)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 256, (12, 4, 32))]
    with flop_counter() as counter:
        base(**batches[0]).loss.backward()
    full = counter.get_total_flops()

    model = get_peft_model(base, GreenTrainerConfig(rho=0.6, low_rank="only", task_type="CAUSAL_LM"))
    # What is selected later joins the groups of this optimizer, and what is deselected stays there, frozen.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step, batch in enumerate(batches):
        with flop_counter() as counter:
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)  # probes, selects, keeps the optimizer in step
        optimizer.zero_grad()
        share = counter.get_total_flops() / full
        print(f"step {step:2}  loss {loss.item():.3f}  {share:.4f} of full fine-tuning")
    print(f"planned {model.base_model.selection.ratio:.4f} of full fine-tuning, counted {share:.4f}")


if __name__ == "__main__":
    main()
