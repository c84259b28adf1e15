"""Kinds of models and ways in: heads of tasks, transformers' own adapters, Auto classes, code that reads weights."""

import copy

import pytest
import torch
from helpers.models import TASKS, make_batch, make_model, make_text, make_tokenizer
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, GreenTrainerLayer, flop_counter
from peft_greentrainer.adapter.values import candidates, set_selection, set_values


HEADS = {kind: "qa_outputs" if "answers" in kind else "score" if "llama" in kind else "classifier" for kind in TASKS}
del HEADS["bert-features"]


def output_of(model, kind):
    with torch.no_grad():
        return model.eval()(**make_batch(kind))[1 if kind in HEADS or kind == "bert-features" else "logits"]


# Heads


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_a_task_is_trained_saved_and_counts_in_the_budget(kind, tmp_path):
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.7, task_type=TASKS[kind][3]))
    head = HEADS[kind]
    wrapper = model.get_base_model().get_submodule(head)
    assert isinstance(wrapper, ModulesToSaveWrapper)
    before = wrapper.modules_to_save["default"].weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        with flop_counter() as counter:
            model(**make_batch(kind, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    selection, graph = model.base_model.selection, model.base_model.model._greentrainer_allocator.graph
    assert f"{head}.weight" in selection.tensors and selection.ratio <= 0.7
    assert counter.get_total_flops() == graph.flops(selection.tensors)  # the fourth step, as planned after the second
    assert not torch.equal(wrapper.modules_to_save["default"].weight, before)

    model.save_pretrained(tmp_path)
    assert f"base_model.model.{head}.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output_of(loaded, kind), output_of(model, kind))
    assert torch.equal(output_of(loaded.merge_and_unload(), kind), output_of(model, kind))


@pytest.mark.parametrize("kind", HEADS)
def test_the_trainer_trains_heads(kind, tmp_path):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=0.8, task_type=TASKS[kind][3]))
    batch = make_batch(kind, rows=8)
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    arguments = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=data, callbacks=[GreenTrainerCallback()]).train()
    assert f"{HEADS[kind]}.weight" in model.base_model.selection.tensors
    assert model.base_model.selection.ratio <= 0.8


# Auto classes


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("llama", AutoPeftModelForCausalLM),
        ("t5", AutoPeftModelForSeq2SeqLM),
        ("bert-sequences", AutoPeftModelForSequenceClassification),
        ("bert-tokens", AutoPeftModelForTokenClassification),
        ("bert-answers", AutoPeftModelForQuestionAnswering),
        ("bert-features", AutoPeftModelForFeatureExtraction),
        ("llama", AutoPeftModel),
        ("bert-features", AutoPeftModel),
    ],
)
def test_auto_classes(kind, auto, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "base")
    base = type(make_model(kind)).from_pretrained(tmp_path / "base")
    task = {"CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}.get(auto.__name__.partition("For")[2])
    task = None if auto is AutoPeftModel else task or TASKS[kind][3]
    model = get_peft_model(base, GreenTrainerConfig(rho=0.8, task_type=task, init_weights=False))
    model.save_pretrained(tmp_path / "delta")
    for is_trainable in (False, True):
        loaded = auto.from_pretrained(tmp_path / "delta", is_trainable=is_trainable)
        assert torch.equal(output_of(loaded, kind), output_of(model, kind))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in loaded.named_parameters() if p.requires_grad} == (names if is_trainable else set())


# transformers' own adapters


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5", "bert", "mixture", "gpt2"])
def test_adapters_of_transformers(kind, tmp_path):
    expected = output_of(make_model(kind), kind)
    model = make_model(kind)
    model.add_adapter(GreenTrainerConfig(rho=1.0, init_weights=False), "first")
    model.add_adapter(GreenTrainerConfig(rho=0.7, init_weights=False), "second")
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert {
            n.split(".greentrainer_values.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad
        } == {name}
        outputs[name] = output_of(model, kind)
        model.save_pretrained(tmp_path / name)
    assert not torch.equal(outputs["first"], outputs["second"])
    model.disable_adapters()
    assert torch.equal(output_of(model, kind), expected)
    model.enable_adapters()
    assert torch.equal(output_of(model, kind), outputs["second"])
    model.delete_adapter("second")
    assert not any(".second." in key for key in model.state_dict())

    loaded = make_model(kind)
    for name in ("first", "second"):
        for low_cpu_mem_usage in (False, True):
            info = loaded.load_adapter(
                tmp_path / name, f"{name}{low_cpu_mem_usage}", low_cpu_mem_usage=low_cpu_mem_usage
            )
            # transformers counts the values of the adapters that were there before as missing
            assert not info.unexpected_keys and not any(f".{name}{low_cpu_mem_usage}." in k for k in info.missing_keys)
            loaded.set_adapter(f"{name}{low_cpu_mem_usage}")
            assert torch.equal(output_of(loaded, kind), outputs[name])
    for name in ("first", "second"):
        loaded.set_adapter(f"{name}False")
        assert torch.equal(output_of(loaded, kind), outputs[name])
    # What transformers saved, peft loads, and the other way round.
    peft_model = PeftModel.from_pretrained(make_model(kind), tmp_path / "second")
    assert torch.equal(output_of(peft_model, kind), outputs["second"])
    peft_model.save_pretrained(tmp_path / "third")
    again = make_model(kind)
    again.load_adapter(tmp_path / "third")
    assert torch.equal(output_of(again, kind), outputs["second"])
    from_file = type(again).from_pretrained
    make_model(kind).save_pretrained(tmp_path / "both")
    peft_model.save_pretrained(tmp_path / "both")
    assert torch.equal(output_of(from_file(tmp_path / "both"), kind), outputs["second"])


def test_the_trainer_trains_an_adapter_of_transformers(tmp_path):
    model = make_model("llama")
    model.add_adapter(GreenTrainerConfig(rho=0.5))
    batch = make_batch("llama", rows=8)
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    arguments = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GreenTrainerCallback()])
    trainer.train()
    assert 0 < model._greentrainer_allocator.selection.ratio <= 0.5
    trainer.save_model(tmp_path / "saved")
    loaded = make_model("llama")
    loaded.load_adapter(tmp_path / "saved")
    assert torch.equal(output_of(loaded, "llama"), output_of(model, "llama"))


# Code that reads a child's weight


class Reader(nn.Module):
    """Reads the weight of a child, calls a function with it, and uses attention, which does both."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.linear(x, self.inner.weight, self.inner.bias)
        x = nn.functional.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.attention(x, x, x)[0] @ self.head.weight.T


@pytest.mark.parametrize("kind", ["reader", "mamba", "mamba2", "qwen3-next"])
def test_every_selected_tensor_moves_in_code_that_reads_weights(kind):
    model = get_peft_model(Reader() if kind == "reader" else make_model(kind), GreenTrainerConfig(rho=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(3):
        if kind == "reader":
            torch.manual_seed(step)
            loss = model(torch.randn(2, 5, 4)).square().sum()
        else:
            loss = model(**make_batch(kind, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = {name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert still <= {"base_model.model.head.greentrainer_values.default.bias"}  # which the reader does not use


def test_the_fused_head_of_trl_trains_the_head(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    for loss_type in ("nll", "chunked_nll"):
        model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=1.0, task_type="CAUSAL_LM"))
        arguments = trl.SFTConfig(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            loss_type=loss_type,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        )
        dataset = datasets.Dataset.from_dict({"text": make_text(8)})
        head = model.get_base_model().lm_head
        before = head.base_layer.weight.clone()
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=dataset,
            processing_class=make_tokenizer(),
            callbacks=[GreenTrainerCallback()],
        )
        trainer.train()
        assert not torch.equal(head.weight, before) and torch.equal(head.base_layer.weight, before)


# Attributes


def test_attributes_stay_reachable():
    model = get_peft_model(make_model("gpt2"), GreenTrainerConfig(rho=1.0))
    base = make_model("gpt2")
    for key, module in model.get_base_model().named_modules():
        if isinstance(module, GreenTrainerLayer):
            plain = base.get_submodule(key)
            for name, parameter in plain.named_parameters(recurse=False):
                effective = getattr(module, name)
                assert effective.requires_grad and torch.equal(effective, parameter)
            for name in ("nf", "nx", "normalized_shape", "eps", "num_embeddings", "embedding_dim", "padding_idx"):
                assert getattr(module, name, "none") == getattr(plain, name, "none")
            with pytest.raises(AttributeError, match="nothing"):
                module.nothing


def test_values_given_to_a_module_by_hand_are_used():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    base = model.get_base_model()
    assert "lm_head.weight" in candidates(base, model.peft_config["default"])
    set_values(base, "default", {"lm_head.weight"})
    set_selection(base, "default", {"lm_head.weight"})
    with torch.no_grad():
        base.lm_head.weight.zero_()
    assert not output_of(model, "llama").any() and base.lm_head.base_layer.weight.any()
