"""Numbers of every size and type: models in float64, gradients that float32 cannot hold, parameters without dimensions."""

import json

import numpy as np
import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from peft import PeftModel, get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig, convert_to_lora, flop_counter
from peft_greentrainer.measuring.importance import CrossBatch, SameBatch, importance
from peft_greentrainer.training.allocator import allocator_of


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def right_importance(grad, rule, lr):
    entries = grad.detach().to_dense().double().numpy()
    return lr * (np.abs(entries).sum() if rule == "adam" else np.square(entries).sum())


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (300, 500), (3, 4, 5), (2, 0)], ids=str)
def test_importance_is_the_sum_in_float64(shape, dtype, rule):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for given in (grad, grad.t() if grad.dim() == 2 else grad, grad.expand(2, *shape)):
        assert importance(given, rule, 0.1).item() == pytest.approx(right_importance(given, rule, 0.1), rel=1e-6)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("size", "dtype"), [(3e38, torch.float32), (1e-30, torch.float32), (1e-140, torch.float64), (1e150, torch.float64)]
)
def test_importance_of_gradients_that_float32_cannot_add_up(size, dtype, rule):
    grad = torch.full((4, 4), size, dtype=dtype)
    grad[0] *= -1
    measured = SameBatch(rule, {})("w", grad)["w"].item()
    assert 0 < measured < np.inf
    assert measured == pytest.approx(right_importance(grad, rule, 1.0), rel=1e-6)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_importance_of_many_small_entries_beside_a_large_one(rule):
    grad = torch.full((2**21,), 1e-4)
    grad[0] = 1e4
    assert SameBatch(rule, {})("w", grad)["w"].item() == pytest.approx(right_importance(grad, rule, 1.0), rel=1e-9)
    assert importance(grad, rule, 1.0).item() == pytest.approx(right_importance(grad, rule, 1.0), rel=1e-6)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_importance_of_sparse_gradients(rule):
    weight = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    rows = nn.functional.embedding(torch.tensor([1, 1, 5]), weight, sparse=True)
    rows.square().sum().backward()
    assert weight.grad.is_sparse
    assert importance(weight.grad, rule, 0.5).item() == pytest.approx(right_importance(weight.grad, rule, 0.5))
    none = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4), (9, 4))
    assert importance(none, rule, 0.5).item() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_importance_of_broken_gradients_is_not_finite(bad, dtype):
    grad = torch.ones(3, dtype=dtype)
    grad[1] = bad
    assert not np.isfinite(importance(grad, "adam", 1.0).item())
    assert not np.isfinite(importance(grad, "sgd", 1.0).item())


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float64), (1e-25, torch.float32), (1e25, torch.float32)])
def test_importance_across_batches(size, dtype, rule):
    generator = torch.Generator().manual_seed(0)
    # In steps that bfloat16 can hold, as what is kept between batches is in it.
    first, second = (torch.randint(-8, 9, (5, 6), generator=generator).to(dtype) for _ in range(2))
    measure = CrossBatch(rule, {"w": 0.5}, {"w"})
    assert measure("w", first * size)["w"].item() == 0
    update = first.sign() if rule == "adam" else first.to(dtype) * size
    update = (update.bfloat16() if rule == "sgd" else update).double().numpy()
    right = 0.5 * (update * (second * size).double().numpy()).sum()
    assert right != 0
    assert measure("w", second * size)["w"].item() == pytest.approx(right, rel=1e-6)


OPTIONS = [
    {},
    {"low_rank": "also", "r": 8},
    {"low_rank": "only"},
    {"probe_batch_size": 2},
    {"importance_batches": 2},
    {"unit": "seconds"},
]


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_float64_model_is_trained_within_the_budget_and_keeps_its_type(options, make_optimizer, tmp_path):
    rho = 1.0 if "unit" in options else 0.6  # the floor in seconds is what the machine makes it
    model = get_peft_model(make_model("llama").double(), GreenTrainerConfig(rho=rho, reselect="once", **options))
    loop = Loop(model, make_optimizer=lambda parameters: make_optimizer(parameters, lr=1e-2)).run(4)
    assert loop.selection.ratio <= rho
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    if "unit" not in options:
        with flop_counter() as counted:
            loop.step()
        assert counted.get_total_flops() == pytest.approx(loop.selection.ratio * full_step(), rel=1e-9)

    batch = make_batch("llama")
    model.eval()
    trained = model(**batch).logits
    assert trained.dtype == torch.float64
    assert not torch.equal(trained, make_model("llama").double().eval()(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama").double(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, trained)
    merged = loaded.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    torch.testing.assert_close(merged(**batch).logits, trained, rtol=1e-12, atol=1e-12)


def full_step():
    base = make_model("llama").double()
    with flop_counter() as counted:
        base(**make_batch("llama")).loss.backward()
    return counted.get_total_flops()


def test_importances_in_a_loop_are_those_of_plain_gradients_in_float64():
    base = make_model("llama").double()
    base(**make_batch("llama", seed=1)).loss.backward()
    model = get_peft_model(make_model("llama").double(), GreenTrainerConfig(rho=1.0))
    # With a learning rate of zero the second step, which is the probe, finds the model as it was.
    Loop(model, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0)).run(2)
    right = {name: right_importance(p.grad, "adam", 1.0) for name, p in base.named_parameters()}
    assert allocator_of(model.get_base_model()).importances == pytest.approx(right, rel=1e-12)


class Mixed(nn.Module):
    """A module in each type, and parameters without dimensions."""

    def __init__(self, dtypes=(torch.float64, torch.float32, torch.bfloat16)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for dtype in dtypes)
        self.scales = nn.ModuleList(Scale(dtype) for dtype in dtypes)
        self.head = nn.Linear(8, 5)

    def forward(self, hidden, labels):
        for layer, scale in zip(self.layers, self.scales):
            hidden = scale(layer(hidden.to(layer.weight.dtype)).tanh())
        logits = self.head(hidden.to(self.head.weight.dtype))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Scale(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))

    def forward(self, hidden):
        return hidden * self.scale


def mixed_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"hidden": torch.randn(6, 8, generator=generator), "labels": torch.arange(6) % 5}


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"low_rank": "also", "r": 2}, {"probe_batch_size": 3}], ids=str)
def test_modules_of_several_types_in_one_model(options, make_optimizer, tmp_path):
    config = GreenTrainerConfig(rho=1.0, reselect="once", **options)
    model = get_peft_model(Mixed(), config)
    loop = Loop(model, make_optimizer=lambda parameters: make_optimizer(parameters, lr=1e-1))
    for seed in range(5):
        loop.step(batch=mixed_batch(seed))
    base = Mixed()
    if not options.get("low_rank"):
        assert loop.selection.tensors == {name for name, _ in base.named_parameters()}
    of_base = dict(base.named_parameters())
    for name, value in model.get_base_model().named_parameters():
        if ".greentrainer_values." in name and "low_rank" not in name:
            tensor = of_base[name.replace(".greentrainer_values.default.", ".")]
            half = tensor.dtype.itemsize < 4
            assert value.dtype == (torch.float32 if half else tensor.dtype)
            assert value.shape == tensor.shape and not torch.equal(value.to(tensor.dtype), tensor)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mixed(), tmp_path)
    assert torch.equal(loaded(**mixed_batch())["logits"], model(**mixed_batch())["logits"])
    merged = loaded.merge_and_unload()
    assert [p.dtype for p in merged.parameters()] == [p.dtype for p in Mixed().parameters()]


def test_a_float64_delta_becomes_a_lora_of_full_rank():
    model = get_peft_model(make_model("llama").double(), GreenTrainerConfig(target_modules=["q_proj"], rho=0.9))
    Loop(model).run(3)
    _, state, left_out = convert_to_lora(model, rank=32)
    assert not left_out
    for name, layer in model.get_base_model().named_modules():
        if name.endswith("q_proj") and (delta := layer.get_delta_weight("default")).any():
            a, b = (state[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            torch.testing.assert_close(b.double() @ a.double(), delta, rtol=0, atol=1e-6)


def test_float64_under_autocast_and_gradient_checkpointing():
    for kind in ("autocast", "checkpointing"):
        base = make_model("llama").double()
        if kind == "checkpointing":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(base, GreenTrainerConfig(rho=0.6)).train()
        loop = Loop(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loop.run(3)
        assert loop.selection.ratio <= 0.6
        assert {value.dtype for value in model.parameters()} == {torch.float64}


def test_a_probe_of_a_float64_model_goes_on_where_it_was_stopped():
    def allocator_after(steps, stop):
        options = {"importance_batches": 3, "rho": 0.6}
        model = get_peft_model(make_model("llama").double(), GreenTrainerConfig(**options))
        loop = Loop(model, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0))
        for step in range(steps):
            loop.step()
            allocator = allocator_of(model.get_base_model())
            if step == stop:
                state = json.loads(json.dumps(allocator.state_dict()))
                assert state["probe"][0]["passes"] == stop
                allocator.resume(state, loop.optimizer)
        return allocator

    whole, resumed = allocator_after(5, None), allocator_after(5, 2)
    assert whole.selection is not None
    assert resumed.importances == whole.importances
    assert resumed.selection == whole.selection


@pytest.mark.parametrize("size", [1e-24, 1e24])
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_losses_of_any_size_are_selected_for(size, make_optimizer):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6))
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for step in range(3):
        (model(**make_batch("llama")).loss * size).backward()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert model.base_model.selection is not None
