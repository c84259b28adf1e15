"""The loops that people have: options of the Trainer, trl, accelerate, compiled models, scalers and optimizers."""

import re

import pytest
import torch
import transformers as tr
from accelerate import Accelerator
from helpers.models import make_batch, make_model, make_text, make_tokenizer
from helpers.training import counting, train_a_little
from peft import PeftModel, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig
from peft_greentrainer.measuring.importance import is_known
from peft_greentrainer.training.allocator import allocator_of


def rows(kind, count=24):
    batch = make_batch(kind, rows=count)
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def make_trainer(
    path, kind="llama", config=None, trainer_cls=Trainer, optimizers=(None, None), callbacks=1, **options
):
    common = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
    }
    arguments_cls = Seq2SeqTrainingArguments if trainer_cls is Seq2SeqTrainer else TrainingArguments
    extra = {name: options.pop(name) for name in ("compute_loss_func", "processing_class") if name in options}
    model = get_peft_model(make_model(kind), GreenTrainerConfig(**{"rho": 0.6, "reselect": 3} | (config or {})))
    if callable(optimizers):
        optimizers = (optimizers([p for p in model.parameters() if p.requires_grad]), None)
    return counting(trainer_cls)(
        model,
        arguments_cls(path, **common | options),
        train_dataset=rows(kind),
        eval_dataset=rows(kind, 8),
        optimizers=optimizers,
        callbacks=[GreenTrainerCallback() for _ in range(callbacks)],
        **extra,
    )


def check(trainer, steps_before_the_last=1):
    """The last step cost what was planned, and only what is selected has optimizer state."""
    base = trainer.model.get_base_model()
    allocator, config = allocator_of(base), trainer.model.peft_config["default"]
    assert 0 < allocator.selection.ratio <= config.rho and not config.provisional
    assert trainer.flops[-1] == allocator.graph.flops(allocator.selection.tensors)
    selected = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert {id(p) for p in optimizer.state} <= selected
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert selected <= set(grouped) and len(grouped) == len(set(grouped))


SCHEDULES = {
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}},
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"},
    "greedy": {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"},
}


def log_likelihood(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": log_likelihood},
        {"max_grad_norm": 0.01},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"train_sampling_strategy": "group_by_length"},
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "adamw_torch", "weight_decay": 0.1},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"optimizers": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3)},
        {
            "optimizers": lambda parameters: torch.optim.Muon(parameters, lr=1e-3),
            "config": {"target_modules": "all-linear"},
        },
        {"callbacks": 2},
        *(
            {"lr_scheduler_type": kind.value, "warmup_steps": 2} | SCHEDULES.get(kind.value, {})
            for kind in SchedulerType
        ),
    ],
    ids=lambda options: re.sub(r" at 0x\w+", "", str(options)),  # two workers have to name them alike
)
def test_options_of_the_trainer(options, tmp_path):
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    check(trainer)
    assert trainer.model.peft_config["default"].spent["steps"] == 6


def test_the_seq2seq_trainer_generates(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "t5",
        trainer_cls=Seq2SeqTrainer,
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="steps",
        eval_steps=1,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    check(trainer)
    generated = trainer.predict(rows("t5", 4), max_length=6).predictions
    merged = trainer.model.merge_and_unload()
    batch = make_batch("t5", rows=4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = merged.generate(**inputs, max_length=6)
    assert torch.equal(torch.tensor(generated)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("loaded", [False, True])
def test_dpo_has_the_copied_adapter_as_its_reference(loaded, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.9, task_type="CAUSAL_LM", reselect=2))
    if loaded:
        train_a_little(model, "llama", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
        model.save_pretrained(tmp_path / "sft")
        model = PeftModel.from_pretrained(make_model("llama"), tmp_path / "sft", is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    started = {name: p.clone() for name, p in model.named_parameters() if ".greentrainer_values.default." in name}

    data = {name: make_text(8, words=8, shift=i) for i, name in enumerate(("prompt", "chosen", "rejected"))}
    arguments = trl.DPOConfig(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=make_tokenizer(),
        callbacks=[GreenTrainerCallback()],
    )
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    references = {name: p for name, p in parameters.items() if ".greentrainer_values.ref." in name}
    assert references.keys() == {name.replace(".default.", ".ref.") for name in started}
    for name, value in started.items():
        assert torch.equal(references[name.replace(".default.", ".ref.")], value), name
    assert 0 < allocator_of(model.get_base_model()).selection.ratio <= 0.9
    moved = [name for name in started if name in parameters and not torch.equal(parameters[name], started[name])]
    assert moved


def run(make, steps=8, **config):
    """Losses, selections and whatever `make` returns, of a plain loop: `make(model, parameters)` gives a step."""
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(**{"rho": 0.6, "reselect": 3} | config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    take = make(model, optimizer)
    losses, selections = [], []
    for step in range(steps):
        losses.append(take(step))
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        selections.append(frozenset(model.peft_config["default"].selected))
    return losses, selections


def plain(model, optimizer):
    def take(step):
        loss = model(**make_batch("llama", seed=step)).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return take


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_once_for_each_selection_and_has_the_same_losses(in_place):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return aot_eager(graph, inputs)

    def make(model, optimizer):
        torch._dynamo.reset()
        if in_place:
            model.compile(backend=backend)
        return plain(model if in_place else torch.compile(model, backend=backend), optimizer)

    expected, selections = run(plain)
    losses, selected = run(make)
    assert selected == selections and losses == pytest.approx(expected, rel=1e-4)
    changes = sum(a != b for a, b in zip(selections, selections[1:]))
    assert len(compilations) <= 1 + max(changes, len(range(1, 8, 3)))


def test_a_loop_with_accelerate_is_the_plain_loop():
    def make(model, optimizer):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)

        def take(step):
            with accelerator.accumulate(prepared):
                loss = prepared(**make_batch("llama", seed=step)).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
                prepared_optimizer.step()
            return loss.item()

        return take

    assert run(make) == run(plain)


def test_a_grad_scaler_changes_no_selection_and_overflow_probes_again():
    def scaled(scale):
        def make(model, optimizer):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)

            def take(step):
                with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
                    loss = model(**make_batch("llama", seed=step)).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                return loss.item()

            return take

        return make

    _, expected = run(scaled(1.0))
    losses, selections = run(scaled(2.0**10))
    assert selections == expected
    with pytest.warns(UserWarning, match="not finite in a probe"):
        losses, selections = run(scaled(2.0**40), steps=40, reselect=50)
    assert selections[0] != selections[-1]  # the scale came down, and a probe succeeded


@pytest.mark.parametrize(
    "make_optimizer",
    [
        torch.optim.Adafactor,
        torch.optim.SGD,
        torch.optim.NAdam,
        torch.optim.RMSprop,
        lambda parameters: pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=1e-3),
    ],
)
def test_any_optimizer_with_groups(make_optimizer):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, reselect=2))
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(6):
        model(**make_batch("llama", seed=step)).loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
        assert len(moved) == len(before)
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert 0 < model.base_model.selection.ratio <= 0.6


def test_a_rule_that_is_not_the_optimizers_own_is_noted():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for known in (torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam):
        assert is_known(known(parameters))
    with pytest.warns(UserWarning, match="that of Adafactor is not known"):
        model.base_model.update_and_allocate(0, torch.optim.Adafactor(parameters))


def test_evaluation_in_between_and_an_exception_in_a_probe_leave_no_trace(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    model = trainer.model
    base = model.get_base_model()
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    backward = torch.autograd.backward

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    handle = base.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    handle.remove()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == flags
    assert torch.autograd.backward is backward
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    trainer.train()
    check(trainer)
    assert tr.is_torch_available()


def test_lightning():
    pytest.importorskip("lightning")
    import lightning_loop

    tuning = lightning_loop.main()
    selection = tuning.model.base_model.selection
    assert selection.ratio <= 0.5
    assert tuning.gflops[-1] / tuning.gflops[1] == pytest.approx(selection.ratio)  # the second step is the probe
