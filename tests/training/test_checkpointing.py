"""Gradient checkpointing keeps the saving: measured FLOPs are those of the plan, whoever made inputs require grad."""

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model, make_text, make_tokenizer
from helpers.training import counting
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, flop_counter, profile


def check_saving(trainer, model, rho):
    trainer.train()
    allocator = model._greentrainer_allocator
    planned = allocator.graph.flops(allocator.selection.tensors)
    assert not allocator.graph.forced_cost and allocator.selection.ratio <= rho
    assert trainer.flops[-1] == pytest.approx(planned, rel=0.02)
    assert trainer.flops[-1] < 1.02 * rho * trainer.flops[0]  # the first step is the probe


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("native", [False, True])
def test_checkpointing_in_the_trainer_keeps_the_saving(kind, native, tmp_path):
    base = make_model(kind)
    if native:
        base.add_adapter(GreenTrainerConfig(rho=0.65))
        model = base
    else:
        base.enable_input_require_grads()  # as some prepare a model, more than once
        model = get_peft_model(base, GreenTrainerConfig(rho=0.65))
        model.enable_input_require_grads()
        model.enable_input_require_grads()
    batch = make_batch(kind, rows=12)
    data = [{name: value[i] for name, value in batch.items()} for i in range(12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
    )
    trainer = counting(Trainer)(model, arguments, train_dataset=data, callbacks=[GreenTrainerCallback()])
    check_saving(trainer, base, 0.65)


@pytest.mark.parametrize("low_rank", ["also", "only"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixture", "whisper"])
def test_low_rank_candidates_under_checkpointing_cost_what_was_planned(kind, low_rank):
    """The last product of a segment is not run again, which costs an update a little less than planned."""
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=0.6, low_rank=low_rank, r=2, reselect=4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loop = Loop(model.train(), kind).run(3)
    checkpointed = make_model(kind)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    full = profile(checkpointed.train(), make_batch(kind)).full_flops
    for _ in range(3):
        with flop_counter() as counter:
            model(**make_batch(kind)).loss.backward()
        loop.optimizer.zero_grad()
        assert loop.selection.low_rank
        assert counter.get_total_flops() / full == pytest.approx(loop.selection.ratio, rel=0.01)
        assert counter.get_total_flops() / full <= 0.6
        loop.run(5)


@pytest.mark.parametrize("ready", [False, True])
def test_checkpointing_in_the_sft_trainer_keeps_the_saving(ready, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = make_model("llama")
    config = GreenTrainerConfig(rho=0.65, task_type="CAUSAL_LM")
    model = get_peft_model(base, config) if ready else base
    trainer = counting(trl.SFTTrainer)(
        model,
        trl.SFTConfig(tmp_path, max_steps=3, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=datasets.Dataset.from_dict({"text": make_text(12, words=16)}),
        processing_class=make_tokenizer(),
        callbacks=[GreenTrainerCallback()],
        peft_config=None if ready else config,
    )
    check_saving(trainer, base, 0.65)


def test_checkpointing_in_a_plain_loop_keeps_the_saving():
    base = make_model("llama")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, GreenTrainerConfig(rho=0.65)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        with flop_counter() as counter:
            model(**make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    allocator = base._greentrainer_allocator
    assert counter.get_total_flops() == allocator.graph.flops(allocator.selection.tensors)


def test_reentrant_checkpointing_keeps_its_hooks_and_is_warned_of():
    base = make_model("llama")
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0)).train()
    base.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.warns(UserWarning, match="'use_reentrant': False"):
        for step in range(2):
            model(**make_batch("llama", seed=step)).loss.backward()
            model.base_model.update_and_allocate(step, optimizer)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_hooks_are_left_where_no_checkpointing_is_known():
    base = make_model("llama")
    base.enable_input_require_grads()
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**make_batch("llama")).loss.backward()
    model.base_model.update_and_allocate(0, optimizer)
    assert any(
        "make_inputs" in h.__name__
        for m in base.modules()
        for h in m._forward_hooks.values()
        if hasattr(h, "__name__")
    )
