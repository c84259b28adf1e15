"""A run that was stopped and resumed is the run that was not: the same losses, the same delta, bit for bit."""

import json

import pytest
import torch
from helpers.models import make_batch, make_model
from helpers.training import outputs
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig


STEPS = 9


def make_trainer(path, kind="llama", config=None, model=None, **options):
    batch = make_batch(kind, rows=24)
    data = [{name: value[i] for name, value in batch.items()} for i in range(24)]
    arguments = TrainingArguments(
        path,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": [],
            "use_cpu": True,
        }
        | options,
    )
    config = GreenTrainerConfig(**{"rho": 0.6, "reselect": 3} | (config or {}))
    model = model or get_peft_model(make_model(kind), config)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[GreenTrainerCallback()])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("llama", {}, {}),
        ("llama", {"importance_batches": 3, "reselect": 4}, {}),
        ("llama", {"importance_batches": 2}, {"gradient_accumulation_steps": 2}),
        ("llama", {"reselect": "epoch"}, {"weight_decay": 0.1}),
        ("llama", {"probe_batch_size": 2}, {"max_grad_norm": 0.1}),
        ("t5", {"reselect": 2}, {"lr_scheduler_type": "cosine"}),
        ("llama", {"low_rank": "also", "r": 2}, {}),
        ("gpt2", {"rho": 0.5, "low_rank": "only", "r": 2, "importance_batches": 2, "reselect": 4}, {"optim": "sgd"}),
    ],
)
def test_resumed_at_any_step_it_is_the_same_run(kind, config, options, tmp_path):
    whole = make_trainer(tmp_path, kind, config, **options)
    whole.train()
    expected = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    selections = {
        tuple(json.loads((tmp_path / f"checkpoint-{step}" / "adapter_config.json").read_text())["selected"])
        for step in range(1, STEPS + 1)
    }
    assert len(selections) > 1  # it did change on the way
    for step in range(1, STEPS):
        resumed = make_trainer(tmp_path / f"resumed-{step}", kind, config, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        found = load_file(tmp_path / f"resumed-{step}" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found), step
        assert resumed.model.peft_config["default"].selected == whole.model.peft_config["default"].selected
        assert resumed.model.peft_config["default"].spent == whole.model.peft_config["default"].spent


def test_the_best_checkpoint_is_restored_exactly(tmp_path):
    trainer = make_trainer(
        tmp_path,
        config={"reselect": 2},
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last one
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith(f"checkpoint-{STEPS}")
    expected = PeftModel.from_pretrained(make_model("llama"), best)
    assert torch.equal(outputs(trainer.model, "llama"), outputs(expected, "llama"))
    trainer.save_model(tmp_path / "saved")
    found, kept = (load_file(f"{path}/adapter_model.safetensors") for path in (tmp_path / "saved", best))
    assert found.keys() == kept.keys() and all(torch.equal(found[key], kept[key]) for key in kept)


def test_a_checkpoint_of_a_run_without_the_callback_is_gone_on_from(tmp_path):
    first = make_trainer(tmp_path, max_steps=3)
    first.remove_callback(GreenTrainerCallback)
    first.train()
    second = make_trainer(tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert 0 < second.model.base_model.selection.ratio <= 0.6


@pytest.mark.parametrize("step", [2, 4, 7])
def test_resumed_on_a_model_that_was_trained_on_it_is_the_same_run(step, tmp_path):
    whole = make_trainer(tmp_path)
    whole.train()
    expected = outputs(whole.model, "llama")
    resumed = make_trainer(tmp_path / "resumed", model=whole.model.train())  # interrupted, and the cell run again
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(outputs(resumed.model, "llama"), expected)


def test_resumed_on_a_loaded_adapter_it_is_the_same_run(tmp_path):
    whole = make_trainer(tmp_path)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-7")
    model = PeftModel.from_pretrained(make_model("llama"), checkpoint, is_trainable=True)
    resumed = make_trainer(tmp_path / "resumed", model=model)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(whole)
    assert torch.equal(outputs(resumed.model, "llama"), outputs(whole.model, "llama"))
