"""The adapted model is a part of what is trained: a classifier, an actor and critic, a list of modules."""

import copy

import pytest
import torch
from helpers.models import make_batch, make_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, flop_counter
from peft_greentrainer.training.allocator import allocator_of
from peft_greentrainer.training.callback import base_model


class Classifier(nn.Module):
    """An adapted model and a head of one's own."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(hidden.mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Pool(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch):
        return self.encoder(**batch).last_hidden_state.mean(1)


class Sentences(nn.Sequential):
    """A list of modules, the first of which holds the adapted one."""

    def __init__(self, encoder):
        super().__init__(Pool(encoder), nn.Linear(32, 2))

    def forward(self, input_ids, attention_mask, labels=None):
        logits = super().forward({"input_ids": input_ids, "attention_mask": attention_mask})
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Around(nn.Module):
    """A container of a container, with a parameter of its own."""

    def __init__(self, encoder):
        super().__init__()
        self.inner = nn.ModuleDict({"module": Classifier(encoder)})
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask, labels=None):
        output = self.inner["module"](input_ids, attention_mask, labels)
        return output | {"loss": self.scale * output["loss"]}


def natively_adapted(config, kind="bert-features"):
    return inject_adapter_in_model(config, make_model(kind), adapter_name="default")


def adapted(config, kind="bert-features"):
    return get_peft_model(make_model(kind), config)


def config(**options):
    return GreenTrainerConfig(**{"rho": 0.7, "reselect": 3} | options)


def rows(count=24):
    batch = make_batch("bert-features", rows=count) | {"labels": torch.arange(count) % 2}
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def batch_of(seed):
    return make_batch("bert-features", seed=seed) | {"labels": torch.arange(4) % 2}


def make_trainer(path, model, callbacks=True, **options):
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(path, **arguments | options),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[GreenTrainerCallback()] if callbacks else [],
    )


CONTAINERS = [
    lambda adapter: Classifier(adapted(adapter)),
    lambda adapter: Classifier(natively_adapted(adapter)),
    lambda adapter: Sentences(adapted(adapter)),
    lambda adapter: Around(adapted(adapter)),
]
IDS = ["peft", "injected", "sequential", "nested"]


@pytest.mark.parametrize("make", CONTAINERS, ids=IDS)
def test_the_trainer_trains_a_container_where_it_trains_it_with_lora(make, tmp_path):
    of_lora = make_trainer(tmp_path / "lora", make(LoraConfig(target_modules=["query"])), callbacks=False)
    of_lora.train()
    trainer = make_trainer(tmp_path / "greentrainer", make(config()), eval_strategy="steps", eval_steps=2)
    heads = [name for name, _ in trainer.model.named_parameters() if "encoder" not in name and "0." != name[:2]]
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(of_lora.evaluate()["eval_loss"], abs=0.3)

    base = base_model(trainer.model)
    allocator = allocator_of(base)
    assert 0 < allocator.selection.ratio <= 0.7
    after = trainer.model.state_dict()
    selected = base.peft_config["default"].selected
    assert selected and heads
    assert all(not torch.equal(before[name], after[name]) for name in heads)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(selected) + len(heads)  # the head was trained in any case, and counts
    assert len(allocator.selection.tensors) == len(trained)
    for name, value in before.items():
        is_of_adapter = "greentrainer_values" in name or "selection_of_values" in name
        assert is_of_adapter or name in heads or torch.equal(value, after[name]), name


@pytest.mark.parametrize("make", CONTAINERS, ids=IDS)
def test_a_plain_loop_over_a_container(make):
    model = make(config())
    base = base_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    counted = []
    for step in range(6):
        with flop_counter() as counter:
            model(**batch_of(step))["loss"].backward()
        counted.append(counter.get_total_flops())
        optimizer.step()
        allocator_of(base).update(step, optimizer)
        optimizer.zero_grad()
    grouped = [id(p) for p in optimizer.param_groups[0]["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} <= set(grouped) and len(grouped) == len(set(grouped))
    assert all(p in optimizer.state for p in trained)
    order = [id(p) for p in model.parameters() if id(p) in set(grouped)]
    assert grouped == order  # that of an optimizer which is made of the container now
    graph, selection = allocator_of(base).graph, allocator_of(base).selection
    assert counted[-1] == graph.flops(selection.tensors)  # the head's pass, which is the container's, among them


@pytest.mark.parametrize("make", CONTAINERS, ids=IDS)
@pytest.mark.parametrize("stopped_at", [2, 4, 7])
def test_a_resumed_run_of_a_container_is_the_one_that_was_not_stopped(make, stopped_at, tmp_path):
    start = copy.deepcopy(make(config()))
    through = make_trainer(tmp_path / "through", copy.deepcopy(start), max_steps=8, save_steps=stopped_at)
    through.train()
    resumed = make_trainer(tmp_path / "resumed", copy.deepcopy(start), max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / f"checkpoint-{stopped_at}"))
    expected, found = through.model.state_dict(), resumed.model.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        log["loss"] for log in through.state.log_history if "loss" in log
    ]


def test_an_inner_peft_model_is_updated_in_a_loop_over_the_container():
    model = Classifier(adapted(config()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # base tensors too
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(5):
        model(**batch_of(step))["loss"].backward()
        optimizer.step()
        model.encoder.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert any(name.endswith("head.weight") for name in model.encoder.base_model.selection.tensors)
    for name, p in model.named_parameters():
        if "greentrainer_values" not in name and "head" not in name:
            assert torch.equal(p, start[name]), name
    assert not torch.equal(model.head.weight, start["head.weight"])
    assert {p for p in optimizer.state if not p.requires_grad} == set()


def test_the_gradients_of_a_container_are_those_of_the_plain_one():
    """At rho 1 a step is one of full fine-tuning, of the plain model in the same container."""
    torch.manual_seed(0)
    plain = Classifier(make_model("bert-features"))
    model = copy.deepcopy(plain)
    model.encoder = get_peft_model(model.encoder, config(rho=1.0, reselect="once"))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.0) for m in (plain, model)]
    for step in range(2):
        model(**batch_of(step))["loss"].backward()
        model.encoder.base_model.update_and_allocate(step, optimizers[1])
        optimizers[1].zero_grad()
    for step in range(3):
        for m, optimizer in zip((plain, model), optimizers):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.zero_grad()
            m(**batch_of(step))["loss"].backward()
            optimizer.step()
    torch.testing.assert_close(model(**batch_of(9))["logits"], plain(**batch_of(9))["logits"])
    torch.testing.assert_close(model.head.weight, plain.head.weight)


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.encoder_a, self.encoder_b = first, second

    def forward(self, input_ids, attention_mask, labels=None):
        first, second = (
            encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            for encoder in (self.encoder_a, self.encoder_b)
        )
        apart = first - second
        return {"loss": apart.square().mean()}


def test_several_adapted_models_inside_one_are_refused_by_name(tmp_path):
    model = Two(adapted(config()), natively_adapted(config()))
    with pytest.raises(ValueError, match=r"Several parts of the model.*: encoder_a, encoder_b\..*freeze"):
        make_trainer(tmp_path, model).train()
    nested = nn.ModuleList([nn.ModuleDict({"deep": adapted(config())}), torch.compile(adapted(config()))])
    with pytest.raises(ValueError, match=r"0\.deep, 1"):
        base_model(nested)


def test_one_adapted_model_beside_others_is_the_one(tmp_path):
    torch.manual_seed(0)
    frozen = make_model("bert-features").requires_grad_(False)
    with_lora = adapted(LoraConfig(target_modules=["query"]))
    of_inference = adapted(config(inference_mode=True)).requires_grad_(False)
    for other in (frozen, with_lora, of_inference, adapted(config()).unload().requires_grad_(False)):
        with torch.no_grad():
            for p in other.parameters():
                p += 0.1 * torch.randn_like(p)
        model = Two(adapted(config()), other)
        trainer = make_trainer(tmp_path, model)
        trainer.train()
        assert 0 < model.encoder_a.base_model.selection.ratio <= 0.7


def test_a_base_with_two_adapters_is_one(tmp_path):
    encoder = adapted(config())
    encoder.add_adapter("other", config())
    model = Classifier(encoder)
    make_trainer(tmp_path, model).train()
    assert encoder.base_model.selection and encoder.peft_config["other"].provisional


def test_no_adapter_at_any_depth_is_refused(tmp_path):
    for model in (Classifier(make_model("bert-features")), Classifier(adapted(LoraConfig(target_modules=["query"])))):
        with pytest.raises(
            ValueError, match=r"found no GreenTrainer adapter.*get_peft_model\(model, GreenTrainerConfig"
        ):
            make_trainer(tmp_path, model).train()


def test_a_model_around_the_base_that_is_of_an_earlier_training_has_no_part(tmp_path):
    encoder = adapted(config())
    first = Classifier(encoder)
    second = Classifier(encoder)
    make_trainer(tmp_path, second).train()
    assert sum("head.weight" in name for name in encoder.base_model.selection.tensors) == 1
    assert first.head.weight.grad is None


def test_a_wrapped_container(tmp_path):
    for wrap in (torch.compile, lambda m: nn.ModuleDict({"ddp": m})):
        inner = Classifier(adapted(config()))
        assert base_model(wrap(inner)) is inner.encoder.get_base_model()


def test_a_head_outside_that_alone_is_over_budget_is_told():
    model = Classifier(adapted(config(rho=0.2)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="rho=0.2 is under the floor"):
        for step in range(2):
            model(**batch_of(step))["loss"].backward()
            model.encoder.base_model.update_and_allocate(step, optimizer)
