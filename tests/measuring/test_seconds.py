"""Costs in seconds. No test looks at a real clock: this one ticks once in every operation."""

import random

import pytest
import torch
from helpers.models import make_batch, make_model
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_greentrainer import GreenTrainerConfig, profile, select
from peft_greentrainer.measuring import seconds
from peft_greentrainer.training.allocator import allocator_of


class Clock(TorchDispatchMode):
    """Every operation takes `step` nanoseconds, and nothing else takes any."""

    def __init__(self):
        super().__init__()
        self.now, self.step = 0, 1

    def perf_counter_ns(self):
        return self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now += self.step
        return func(*args, **(kwargs or {}))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(seconds, "time", clock)
    monkeypatch.setattr(seconds, "optimizer_seconds", lambda optimizer, like: (0.0, 0.0))
    with clock:
        yield clock


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "mixture", "experts", "convnet"])
def test_a_step_is_charged_the_operations_that_it_runs(kind, clock):
    model, batch = make_model(kind), make_batch(kind)
    graph = profile(model, batch, unit="seconds")
    choose = random.Random(0)
    for _ in range(6):
        subset = choose.sample(graph.tensors, choose.randint(1, len(graph.tensors)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in subset)
            parameter.grad = None
        before = clock.now
        output = model(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
        # Putting a gradient into `.grad` takes an operation or two that no gradient comes from.
        assert graph.cost(subset) == pytest.approx(clock.now - before, rel=0.03, abs=3 + 2 * len(subset))


def test_no_flops_get_among_the_seconds(clock):
    # T5 without dropout runs another attention kernel where its bias is frozen: FLOPs that no pass can time.
    model, batch = make_model("t5-fused"), make_batch("t5-fused")
    graph = profile(model, batch, unit="seconds")
    before = clock.now
    model(**batch).loss.backward()
    assert graph.condition is None
    assert graph.full_cost == pytest.approx(clock.now - before, abs=3 + 2 * len(graph.tensors))


def test_the_optimizers_pass_is_charged_to_the_tensors_it_updates(clock, monkeypatch):
    monkeypatch.setattr(seconds, "optimizer_seconds", lambda optimizer, like: (1e-3, 1e-6))
    model, batch = make_model("llama"), make_batch("llama")
    graph = profile(model, batch, unit="seconds")
    one, two = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.gate_proj.weight"
    difference = graph.seconds([one, two]) - graph.seconds([one])
    assert difference == pytest.approx(1e-3 + 1e-6 * model.get_parameter(two).numel(), rel=1e-4)


def test_medians_drop_what_disturbed_one_pass(clock, monkeypatch):
    model, batch = make_model("gpt2"), make_batch("gpt2")
    undisturbed = profile(model, batch, unit="seconds")
    passes = 0
    forward = model.forward

    def disturbed(*args, **kwargs):
        nonlocal passes
        passes += 1
        # Something else takes the machine in the warm-up, in one pass that is timed as a whole and in one that is recorded.
        clock.step = 1000 if passes in (1, 4, 7) else 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", disturbed)
    graph = profile(model, batch, unit="seconds")
    assert passes == 7
    assert graph.full_cost == undisturbed.full_cost


def test_select_keeps_a_budget_in_seconds(clock):
    graph = profile(make_model("gpt2"), make_batch("gpt2"), unit="seconds")
    assert graph.unit == "seconds" and graph.ratio(graph.tensors) == 1
    for rho in (0.6, 0.7, 0.9):
        selection = select(graph, dict.fromkeys(graph.tensors, 1.0), rho)
        assert selection.tensors and selection.ratio == graph.ratio(selection.tensors) <= rho


@pytest.mark.parametrize("rows", [None, 1])
def test_training_within_a_budget_in_seconds(rows, clock):
    model = get_peft_model(
        make_model("llama"), GreenTrainerConfig(rho=0.75, unit="seconds", probe_batch_size=rows, reselect="once")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    same = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.75, reselect="once", probe_batch_size=rows))
    other = torch.optim.AdamW([p for p in same.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        for m, o in ((model, optimizer), (same, other)):
            m(**make_batch("llama", seed=step)).loss.backward()
            o.step()
            m.base_model.update_and_allocate(step, o)
            o.zero_grad()
    found, expected = (allocator_of(m.get_base_model()) for m in (model, same))
    assert found.graph.unit == "seconds" and expected.graph.unit == "flops"
    assert found.importances == expected.importances  # the passes that are timed leave nothing behind
    assert found.graph.tensors == expected.graph.tensors
    assert found.graph.floor < found.selection.ratio <= 0.75


def test_the_loss_may_be_made_outside_the_model(clock):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.75, unit="seconds"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.update_and_allocate(0, optimizer)
    batch = make_batch("llama")
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten()).backward()
    model.base_model.update_and_allocate(1, optimizer)
    assert model.base_model.selection.ratio <= 0.75


def test_the_users_optimizer_is_timed():
    made = []

    class Spy(torch.optim.SGD):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            made.append(self.defaults["momentum"])

    optimizer = Spy([torch.nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9)
    per_tensor, per_weight = seconds.optimizer_seconds(optimizer, torch.zeros(1))
    assert made == [0.9] * 3
    assert per_tensor >= 0 and per_weight > 0


def test_units_are_not_mixed_up(clock):
    model, batch = make_model("gpt2"), make_batch("gpt2")
    timed, counted = profile(model, batch, unit="seconds"), profile(model, batch)
    with pytest.raises(ValueError, match="in seconds: profile.*unit='flops'"):
        timed.flops(timed.tensors)
    with pytest.raises(ValueError, match="in flops: profile.*unit='seconds'"):
        counted.seconds(counted.tensors)
    with pytest.raises(ValueError, match="unit must be"):
        profile(model, batch, unit="hours")
    with pytest.raises(ValueError, match="meta device"):
        profile(model.to("meta"), {name: value.to("meta") for name, value in batch.items()}, unit="seconds")
    with pytest.raises(ValueError, match="unit must be"):
        GreenTrainerConfig(unit="hours")
