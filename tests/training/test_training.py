"""Training loops: what is measured, what is selected, and that nothing but the selected tensors moves."""

import copy
import warnings

import pytest
import torch
from helpers.loop import Loop
from helpers.memory import peak_bytes
from helpers.models import llama, make_batch, make_model
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, flop_counter, profile
from peft_greentrainer.adapter.values import candidates, layers
from peft_greentrainer.measuring.importance import importance
from peft_greentrainer.training.allocator import allocator_of


def make_peft_model(kind="llama", **options):
    return get_peft_model(make_model(kind), GreenTrainerConfig(**{"rho": 0.6, **options}))


def dataset(kind, rows):
    return [{k: v[0] for k, v in make_batch(kind, rows=1, seed=i).items()} for i in range(rows)]


def arguments(folder, **options):
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(folder, **quiet, **options)


def values(model):
    """A copy of every value, by the name of its tensor."""
    return {
        f"{key}.{name}": value.detach().clone()
        for key, layer in layers(model.get_base_model()).items()
        for name, value in layer.greentrainer_values["default"].items()
    }


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "bert", "mixture", "convnet"])
def test_plain_loop(kind):
    model = make_peft_model(kind)
    start = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    loop = Loop(model, kind)
    optimizer = loop.optimizer
    loop.step()
    assert loop.selection is None and model.peft_config["default"].provisional
    loop.step()  # the probe
    selected = loop.selection.tensors
    assert selected and loop.selection.ratio <= 0.6
    assert set(model.peft_config["default"].selected) == set(model.peft_config["default"].tensors) == selected

    before = values(model)
    loop.step()
    after = values(model)
    assert before.keys() == after.keys() == selected
    unmoved = {name for name in selected if torch.equal(before[name], after[name])}
    assert all("bias" in name for name in unmoved)  # a key's bias has no gradient in a softmax
    assert loop.optimizer is optimizer
    state = model.get_base_model().state_dict()
    of_adapter = ("greentrainer_values", "selection_of_values")
    assert all(torch.equal(start[n], t) for n, t in state.items() if not any(part in n for part in of_adapter))

    batch = make_batch(kind, seed=1)  # the batch of the probe
    with flop_counter() as counter:
        output = model(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    graph = allocator_of(model.get_base_model()).graph
    assert counter.get_total_flops() == graph.flops(selected)
    assert counter.get_total_flops() / graph.full_flops == loop.selection.ratio


def test_the_probe_measures_what_a_full_pass_would():
    base = make_model("llama")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.6))
    loop = Loop(model, make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.0))
    loop.step()
    loop.step()
    allocator = allocator_of(model.get_base_model())
    batch = make_batch("llama", seed=1)
    base(**batch).loss.backward()
    expected = profile(base, batch)
    assert allocator.graph.full_flops == expected.full_flops
    assert allocator.graph.flops(expected.tensors[4:9]) == expected.flops(expected.tensors[4:9])
    assert allocator.importances.keys() == dict(base.named_parameters()).keys()
    for name, parameter in base.named_parameters():  # all rates are zero, so none of them counts
        assert allocator.importances[name] == pytest.approx(parameter.grad.abs().sum().item(), rel=1e-4)


def test_importance_is_the_first_update_times_the_gradient():
    base = make_model("llama")
    batch = make_batch("llama", seed=1)
    base(**batch).loss.backward()
    for make, rule in ((torch.optim.Adam, "adam"), (torch.optim.SGD, "sgd")):
        moved = copy.deepcopy(base)
        optimizer = make(moved.parameters(), lr=1e-3)
        for parameter, original in zip(moved.parameters(), base.parameters()):
            parameter.grad = original.grad.clone()
        optimizer.step()
        for parameter, original in zip(moved.parameters(), base.parameters()):
            drop = -((parameter - original) * original.grad).sum()
            torch.testing.assert_close(importance(original.grad, rule, 1e-3), drop, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_importances_of_a_probe(make):
    model = make_peft_model()
    base = make_model("llama")
    loop = Loop(model, make_optimizer=lambda p: make(p, lr=1e-2))
    loop.step()
    with torch.no_grad():  # what the provisional selection learned in the first step
        for name, value in values(model).items():
            base.get_parameter(name).copy_(value)
    loop.step()
    base(**make_batch("llama", seed=1)).loss.backward()
    rule = "sgd" if make is torch.optim.SGD else "adam"
    measured = allocator_of(model.get_base_model()).importances
    for name, parameter in base.named_parameters():
        assert measured[name] == pytest.approx(importance(parameter.grad, rule, 1e-2).item(), rel=1e-4)


def test_a_probe_leaves_no_trace():
    model = make_peft_model(reselect=2)
    loop = Loop(model)
    backward = torch.autograd.backward
    flags = None
    for _ in range(4):
        loop.step()
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("greentrainer_values" in n for n in names)
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        assert not any(p.grad is not None for p in model.parameters())
        assert torch.autograd.backward is backward
        flags = names
    assert len(flags) == len(loop.selection.tensors)


def test_only_trained_tensors_have_gradients_after_a_probe_and_accumulation_is_exact():
    """The gradient of a step of two micro-batches is the same with and without a probe in it."""
    model = make_peft_model(reselect=1000)
    loop = Loop(model)
    plain = copy.deepcopy(model)
    loop.step()  # arms
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        for seed in (7, 8):
            m(**make_batch("llama", seed=seed)).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys() and all("greentrainer_values" in n for n in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, plain)]
    torch.testing.assert_close(*norms)
    loop.optimizer.step()
    model.base_model.update_and_allocate(1, loop.optimizer)
    assert loop.selection is not None


def test_reselection_keeps_what_was_learned_and_drops_the_state():
    model = make_peft_model(rho=0.45, reselect=2)
    loop = Loop(model)
    for _ in range(2):
        loop.step()
    first = loop.selection.tensors
    loop.step()
    learned = values(model)
    order = {name: i for i, name in enumerate(dict(model.named_parameters()))}
    while loop.selection.tensors == first and loop.steps < 40:
        learned = values(model)
        loop.step()
    second = loop.selection.tensors
    assert first - second and second - first
    config = model.peft_config["default"]
    assert set(config.selected) == second and first | second <= set(config.tensors)

    order = {id(p): i for i, (_, p) in enumerate(model.named_parameters())}
    (group,) = loop.optimizer.param_groups
    places = [order[id(p)] for p in group["params"]]
    assert len(places) == len(config.tensors) and places == sorted(places)
    by_name = dict(model.named_parameters())
    parameter = {
        n: by_name[f"base_model.model.{n.rpartition('.')[0]}.greentrainer_values.default.{n.rpartition('.')[2]}"]
        for n in config.tensors
    }
    assert all(parameter[n] not in loop.optimizer.state and not parameter[n].requires_grad for n in first - second)

    before = values(model)
    loop.step()
    after = values(model)
    assert all(not torch.equal(before[n], after[n]) for n in second)
    assert all(torch.equal(before[n], after[n]) for n in first - second)
    assert learned.keys() <= after.keys()


@pytest.mark.parametrize("low_rank", [False, "also", "only"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rho", [0.5, 0.6, 0.7])
def test_the_provisional_selection_costs_about_rho(rho, tied, low_rank):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 4096}
    with torch.device("meta"):
        model = llama(**sizes, tie_word_embeddings=tied)
        tokens = torch.zeros(1, 64, dtype=torch.long)
        graph = profile(model, {"input_ids": tokens, "labels": tokens}, r=8 if low_rank else None)
        model = get_peft_model(model, GreenTrainerConfig(rho=rho, low_rank=low_rank))
    assert graph.ratio(model.peft_config["default"].selected) == pytest.approx(rho, abs=0.015)


def test_the_provisional_selection_leaves_nothing_behind():
    model = make_peft_model(rho=0.9)
    loop = Loop(model, make_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    provisional = set(model.peft_config["default"].selected)
    model.peft_config["default"].rho = 0.4
    loop.step()
    loop.step()
    assert provisional - loop.selection.tensors
    assert values(model).keys() == loop.selection.tensors
    (group,) = loop.optimizer.param_groups
    assert len(group["params"]) == len(loop.selection.tensors)
    assert loop.optimizer.state.keys() <= set(group["params"])


@pytest.mark.parametrize(
    ("reselect", "probed"),
    [("once", [1]), (3, [1, 4, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), ("epoch", [1, 5])],
)
def test_schedule(reselect, probed):
    model = make_peft_model(reselect=reselect)
    loop = Loop(model)
    found, last = [], None
    for step in range(8):
        loop.step(epoch=step // 4)
        if loop.selection is not last:
            found.append(step)
            last = loop.selection
    assert found == probed


def test_epochs_have_to_be_told():
    loop = Loop(make_peft_model(reselect="epoch"))
    with pytest.raises(ValueError, match="epoch=epoch"):
        loop.step()


def test_importance_is_averaged_over_batches():
    model = make_peft_model(importance_batches=3)
    loop = Loop(model, make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-9))
    for step in range(4):
        assert loop.selection is None
        loop.step()
    assert loop.selection is not None
    allocator = allocator_of(model.get_base_model())
    base = make_model("llama")
    total = 0.0
    for seed in (1, 2, 3):
        base.zero_grad()
        base(**make_batch("llama", seed=seed)).loss.backward()
        total += importance(base.lm_head.weight.grad, "sgd", 1e-9).item()
    assert allocator.importances["lm_head.weight"] == pytest.approx(total / 3, rel=1e-3)


def test_probe_on_fewer_rows_leaves_the_step_as_usual():
    model = make_peft_model(probe_batch_size=1)
    plain = copy.deepcopy(model)
    loop = Loop(model)
    loop.step()
    plain.load_state_dict(model.state_dict())
    batch = make_batch("llama", seed=5)
    with flop_counter() as of_probe:
        model(**batch).loss.backward()
    with flop_counter() as of_step:
        plain(**batch).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad)
    loop.optimizer.step()
    model.base_model.update_and_allocate(1, loop.optimizer)
    graph = allocator_of(model.get_base_model()).graph
    one_row = profile(make_model("llama"), {name: value[:1] for name, value in batch.items()})
    assert graph.full_flops == one_row.full_flops
    assert of_probe.get_total_flops() == of_step.get_total_flops() + one_row.full_flops
    assert loop.selection.ratio <= 0.6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_values_join_the_groups_that_transformers_would_choose(kind, tmp_path):
    model = make_peft_model(kind, rho=0.7, reselect=3)
    data = dataset(kind, 16)
    args = arguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        learning_rate=1e-2,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[GreenTrainerCallback()])
    trainer.train()
    config = model.peft_config["default"]
    decayed = set(trainer.get_decay_parameter_names(make_model(kind)))
    name_of = {id(p): n for n, p in model.named_parameters()}
    found = [
        [
            name_of[id(p)].replace("base_model.model.", "", 1).replace("greentrainer_values.default.", "")
            for p in g["params"]
        ]
        for g in trainer.optimizer.param_groups
    ]
    assert sorted(found[0] + found[1]) == sorted(config.tensors)
    assert set(found[0]) == set(config.tensors) & decayed and set(found[1]) == set(config.tensors) - decayed
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]

    # As if the optimizer had been made at the end, over everything in the file.
    for p in model.parameters():
        p.requires_grad_("greentrainer_values" in name_of[id(p)])
    trainer.optimizer = None
    fresh = trainer.create_optimizer()
    again = [
        [
            name_of[id(p)].replace("base_model.model.", "", 1).replace("greentrainer_values.default.", "")
            for p in g["params"]
        ]
        for g in fresh.param_groups
    ]
    assert again == found


def test_trainer_end_to_end(tmp_path):
    base = make_model("llama-tied")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.5, reselect="epoch", task_type="CAUSAL_LM"))
    data = dataset("llama", 16)
    args = arguments(
        tmp_path / "run",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        warmup_steps=2,
        learning_rate=1e-2,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[GreenTrainerCallback()])
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(data)["eval_loss"]
    assert after < before
    assert model.base_model.selection.ratio <= 0.5
    model.save_pretrained(tmp_path / "delta")
    loaded = PeftModel.from_pretrained(base, tmp_path / "delta")
    batch = make_batch("llama")
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_the_budget_includes_modules_to_save():
    model = make_peft_model("convnet", rho=0.8, modules_to_save=["head"])
    loop = Loop(model, "convnet")
    loop.step()
    loop.step()
    assert {"head.weight", "head.bias"} <= loop.selection.tensors
    with flop_counter() as counter:
        model(**make_batch("convnet", seed=1))["loss"].backward()
    graph = allocator_of(model.get_base_model()).graph
    assert counter.get_total_flops() == graph.flops(loop.selection.tensors) <= 0.8 * graph.full_flops
    assert any(p.requires_grad for n, p in model.named_parameters() if "modules_to_save" in n)


def test_rho_one_trains_everything_like_full_fine_tuning():
    base = make_model("llama")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0, reselect="once"))
    loop = Loop(model, make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    loop.step({**make_batch("llama"), "labels": torch.full((4, 16), 5)})
    loop.step()
    assert loop.selection.tensors == dict(base.named_parameters()).keys()
    full = copy.deepcopy(model).merge_and_unload()
    for p in full.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(full.parameters(), lr=1e-2)
    for seed in (2, 3):
        full(**make_batch("llama", seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.step()
    torch.testing.assert_close(model(**make_batch("llama")).logits, full(**make_batch("llama")).logits)


def test_a_probe_needs_no_more_memory_than_a_full_pass():
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 256}
    batch = {"input_ids": torch.randint(3, 256, (4, 64))}
    batch["labels"] = batch["input_ids"]
    full = llama(**sizes)
    for parameter in full.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def peak(model):
        return peak_bytes(lambda: model(**batch).loss.backward())

    def peaks(probe_batch_size):
        """Of a probe, and of the step that follows."""
        model = get_peft_model(llama(**sizes), GreenTrainerConfig(rho=0.5, probe_batch_size=probe_batch_size))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model.base_model.update_and_allocate(0, optimizer)
        probe = peak(model)
        model.base_model.update_and_allocate(1, optimizer)
        optimizer.zero_grad()
        return probe, peak(model)

    peak(full)  # the first pass of a process also allocates what stays
    probe, budgeted = peaks(None)
    assert probe <= 1.02 * peak(full)
    assert budgeted < 0.7 * probe
    of_one_row, _ = peaks(1)
    assert of_one_row <= 1.2 * budgeted


# Bad input


class NotFinite(nn.Module):
    """A model whose loss is not finite in the steps that are asked for."""

    def __init__(self, bad):
        super().__init__()
        self.first, self.second, self.bad, self.calls = nn.Linear(4, 4), nn.Linear(4, 1), bad, 0

    def forward(self, x):
        self.calls += 1
        loss = self.second(torch.relu(self.first(x))).square().mean()
        return {"loss": loss * float("nan") if self.calls in self.bad else loss}


def test_a_loss_that_is_not_finite_keeps_the_selection_and_warns_once():
    model = get_peft_model(NotFinite(bad={2, 3}), GreenTrainerConfig(rho=0.9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    provisional = list(model.peft_config["default"].selected)

    def step(number):
        model(torch.ones(2, 4))["loss"].backward()
        model.base_model.update_and_allocate(number, optimizer)
        optimizer.zero_grad()

    step(0)
    with pytest.warns(UserWarning, match="not finite in a probe.*selection stays"):
        step(1)
    assert model.peft_config["default"].selected == provisional and model.base_model.selection is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(2)
    optimizer.param_groups[0]["lr"] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(3)
    assert model.base_model.selection is None or model.base_model.selection.tensors


def untouched(model, names):
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_rho_under_the_floor_changes_nothing():
    model = make_peft_model(rho=0.2)
    loop = Loop(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    loop.step()
    config = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match="rho=0.2 is under the floor"):
        loop.step()
    untouched(model, names)
    assert model.peft_config["default"] == config


def test_an_importance_of_zero_changes_nothing():
    model = make_peft_model("convnet")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.base_model.update_and_allocate(0, optimizer)
    (model(**make_batch("convnet"))["loss"] * 0).backward()
    with pytest.warns(UserWarning, match="Every gradient was zero in a probe"):
        model.base_model.update_and_allocate(1, optimizer)
    untouched(model, names)
    optimizer.zero_grad()
    model(**make_batch("convnet"))["loss"].backward()
    model.base_model.update_and_allocate(2, optimizer)
    assert model.base_model.selection.tensors


def test_two_active_adapters_are_refused():
    model = make_peft_model()
    model.add_adapter("other", GreenTrainerConfig())
    model.base_model.set_adapter(["default", "other"])
    loop = Loop(model)
    with pytest.raises(ValueError, match=r"\['default', 'other'\] are active: call set_adapter"):
        loop.step()


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    make_peft_model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="is_trainable=True"):
        model.base_model.update_and_allocate(0, optimizer)


def test_probing_rows_needs_a_loss_from_the_model():
    model = make_peft_model("convnet", probe_batch_size=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.base_model.update_and_allocate(0, optimizer)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="gives no loss"):
        model(make_batch("convnet")["images"])
    untouched(model, names)


def test_saving_what_was_never_selected_warns(tmp_path):
    model = make_peft_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**make_batch("llama")).loss.backward()
    optimizer.step()
    with pytest.warns(
        UserWarning, match=r"no selection was ever made.*callbacks=\[GreenTrainerCallback\(\)\].*update_and_allocate"
    ):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no selection was ever made"):
        model.merge_and_unload()


def test_training_that_ends_without_a_selection_warns(tmp_path):
    model = make_peft_model(importance_batches=9)
    data = dataset("llama", 4)
    args = arguments(tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="no selection was ever made"):
        Trainer(model, args, train_dataset=data, callbacks=[GreenTrainerCallback()]).train()
    untouched(model, {n for n, p in model.named_parameters() if p.requires_grad and "greentrainer_values" in n})


def test_the_callback_refuses_a_model_without_an_adapter(tmp_path):
    data = dataset("llama", 4)
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"get_peft_model\(model, GreenTrainerConfig"):
        Trainer(make_model("llama"), args, train_dataset=data, callbacks=[GreenTrainerCallback()]).train()


def test_candidates_of_a_trained_model_are_those_of_the_base():
    model = make_peft_model("t5")
    loop = Loop(model, "t5")
    before = sorted(candidates(model.get_base_model(), model.peft_config["default"]))
    loop.step()
    loop.step()
    assert sorted(candidates(model.get_base_model(), model.peft_config["default"])) == before
