"""Low-rank candidates: what they cost is exact, their importance is the drop that comes, and what they learn stays."""

import copy
import random

import pytest
import torch
from helpers.loop import Loop
from helpers.models import MODELS, make_batch, make_model
from helpers.training import outputs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Adafactor
from transformers.pytorch_utils import Conv1D

from peft_greentrainer import GreenTrainerConfig, convert_to_lora, export_tensors, flop_counter, profile, select
from peft_greentrainer.adapter.values import candidates, layers
from peft_greentrainer.measuring.importance import CrossBatch
from peft_greentrainer.tensors.forms import LowRankForm
from peft_greentrainer.tensors.names import factors, is_low_rank, low_rank_form, tensor_of
from peft_greentrainer.training.allocator import allocator_of
from peft_greentrainer.training.apply import apply_selection
from peft_greentrainer.training.placement import OptimizerSetup, find_placement


RANK = 3


class Updated(nn.Module):
    """A linear module with a low-rank update, as anybody would write it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        is_conv1d = isinstance(linear, Conv1D)
        self.A = nn.Parameter(torch.randn(RANK, linear.nx if is_conv1d else linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.nf if is_conv1d else linear.out_features, RANK))

    def forward(self, x):
        return self.linear(x) + nn.functional.linear(nn.functional.linear(x, self.A), self.B)

    def __getattr__(self, name):
        return (
            getattr(super().__getattr__("linear"), name) if name in ("weight", "bias") else super().__getattr__(name)
        )


def counted(model, batch, candidates):
    """What a step costs in which these candidates are trained, in a copy of the model that has their factors."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name in candidates:
        if not is_low_rank(name):
            model.get_parameter(name).requires_grad_(True)
    for name in filter(is_low_rank, candidates):
        key = tensor_of(name).rpartition(".")[0]
        model.set_submodule(key, Updated(model.get_submodule(key)))
    with flop_counter() as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def one_form_each(candidates, choose):
    shuffled = choose.sample(candidates, len(candidates))
    return list({tensor_of(name): name for name in shuffled}.values())


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("convnext", "clip")])
def test_flops_of_random_forms_are_exact(kind):
    model, batch = make_model(kind), make_batch(kind)
    graph = profile(model, batch, r=RANK)
    assert graph.full_flops == profile(model, batch).full_flops
    choose = random.Random(0)
    for share in (0.05, 0.3, 0.6, 1.0):
        either = one_form_each(graph.tensors, choose)
        subset = either[: max(1, round(share * len(either)))]
        assert graph.flops(subset) == counted(model, batch, subset)
        bound = graph.forward_flops + graph.costs @ graph.bounded_needs[graph.rows(subset)].any(axis=0)
        assert graph.flops(subset) <= bound


def test_the_same_tensors_have_a_low_rank_form_for_a_profile_and_for_an_adapter():
    """GPT-2 has transposed weights; a subclass with a forward pass of its own has no form, whatever it computes."""

    class Twice(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    def forms(other_forward):
        model, config = make_model("gpt2"), GreenTrainerConfig(low_rank="also")
        if other_forward:
            model.transformer.h[0].mlp.c_fc.__class__ = Twice
        of_profile = set(filter(is_low_rank, profile(model, make_batch("gpt2"), r=RANK).tensors))
        adapted = set(filter(is_low_rank, candidates(get_peft_model(model, config).get_base_model(), config)))
        assert adapted == of_profile
        return adapted

    assert forms(False) - forms(True) == {"transformer.h.0.mlp.c_fc.weight_low_rank"}


def run(kind="llama", steps=6, lr=1e-2, **options):
    config = GreenTrainerConfig(**{"rho": 0.6, "low_rank": "also", "r": 2, "reselect": 4} | options)
    model = get_peft_model(make_model(kind), config)
    return Loop(model, kind, lambda parameters: torch.optim.AdamW(parameters, lr=lr)).run(steps)


@pytest.mark.parametrize("options", [{}, {"low_rank": "only"}, {"probe_batch_size": 2}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt", "bert", "bart", "mixture", "qwen3-next"])
def test_a_step_costs_what_was_planned(kind, options):
    loop = run(kind, steps=3, **options)
    allocator, batch = allocator_of(loop.model.get_base_model()), make_batch(kind)
    of_full = profile(make_model(kind), batch).full_flops
    forms = set()
    for _ in range(3):  # before, between and after selections that find factors of the one before
        with flop_counter() as counter:
            loop.model(**batch).loss.backward()
        loop.optimizer.zero_grad()
        assert counter.get_total_flops() / of_full == pytest.approx(loop.selection.ratio, rel=1e-9)
        assert allocator.graph.ratio(loop.selection.candidates) == loop.selection.ratio <= 0.6
        forms |= set(map(is_low_rank, loop.selection.candidates))
        loop.run(5)
    assert True in forms


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5"])
def test_only_offers_no_whole_linear_tensors(kind):
    base = make_model(kind)
    of_linear = {id(module.weight) for module in base.modules() if isinstance(module, nn.Linear)}
    linear = {name for name, parameter in base.named_parameters() if id(parameter) in of_linear}
    config = GreenTrainerConfig(low_rank="only")
    offered = candidates(get_peft_model(base, config).get_base_model(), config)
    assert any(map(is_low_rank, offered)) and not linear & set(offered)
    # A head that is tied to the embedding has no low-rank form, and so none at all.
    assert any("embed" in name for name in offered) == (kind == "llama")


def test_at_rho_one_linear_tensors_are_whole_unless_none_are_offered():
    graph = profile(make_model("llama"), make_batch("llama"), r=RANK)
    importance = dict.fromkeys(graph.tensors, 1.0)
    assert not select(graph, importance, rho=1.0).low_rank
    only = run(rho=1.0, low_rank="only", steps=3).selection
    assert len(only.low_rank) > 10 and only.ratio < 1


def test_selection_knows_tensors_and_forms():
    graph = profile(make_model("llama"), make_batch("llama"), r=RANK)
    importance = {name: 1.0 if is_low_rank(name) else 0.1 for name in graph.tensors}
    selection = select(graph, importance, rho=0.6)
    assert selection.low_rank < selection.tensors <= set(map(tensor_of, graph.tensors))
    assert len(selection.candidates) == len(selection.tensors)
    assert graph.ratio(selection.candidates) == selection.ratio


@pytest.mark.parametrize("form", ["whole", "low-rank"])
def test_importance_is_the_drop_on_another_batch(form):
    """To first order, from the update that Adam makes first."""
    torch.manual_seed(0)
    model, rate = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double(), 1e-6
    linear, seed = model[0], 5
    low_rank = LowRankForm(rank=4, lr=10.0)
    name = "up_proj.weight"
    candidate = name if form == "whole" else low_rank_form(name)
    measure = CrossBatch("adam", rates={name: rate}, candidates={name, low_rank_form(name)})
    factor_a = low_rank.first_factor(linear.in_features, seed).double()
    batches, grads = torch.randn(2, 50, 20, dtype=torch.double), []

    def loss(batch):
        return (model(batch) - batch[:, :4]).square().mean()

    for batch in batches:
        (grad,) = torch.autograd.grad(loss(batch), [linear.weight])
        if form == "low-rank":
            grad = grad @ factor_a.T * low_rank.scale
        measured = factors(candidate)[1] if form == "low-rank" else name
        importance = measure(measured, grad)[candidate]
        grads.append(grad)
    before = loss(batches[1]).item()
    update = -rate * grads[0].sign()
    linear.weight.data += update if form == "whole" else low_rank.scale * update @ factor_a
    assert before - loss(batches[1]).item() == pytest.approx(importance.item(), rel=1e-3)


def test_factors_learn_as_in_a_parameter_group_of_their_own():
    """In Adam's hands a factor stored `lr` times too small moves as one with `lr` times the learning rate."""
    form, rate = LowRankForm(rank=2, lr=10.0), 1e-3
    x, target = torch.randn(2, 30, 8, dtype=torch.double).unbind()
    first, second = form.first_factor(8, seed=0).double(), torch.zeros(8, 2, dtype=torch.double)
    stored = [nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    plain = [nn.Parameter(first * form.lr), nn.Parameter(second * form.lr)]
    runs = [
        (stored, form.scale, torch.optim.AdamW(stored, lr=rate, weight_decay=0, eps=0)),
        (plain, form.scale / form.lr**2, torch.optim.AdamW(plain, lr=rate * form.lr, weight_decay=0, eps=0)),
    ]
    for _ in range(20):
        for (factor_a, factor_b), scale, optimizer in runs:
            factor_b.data[factor_b == 0] = 1e-12  # without eps, nothing else has no gradient
            ((x @ factor_a.T @ factor_b.T) * scale - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    products = [factor_b @ factor_a * scale for (factor_a, factor_b), scale, _ in runs]
    torch.testing.assert_close(*products, rtol=1e-6, atol=1e-8)


def test_what_was_learned_in_either_form_stays():
    loop = run(reselect="once", steps=4)
    allocator = allocator_of(loop.model.get_base_model())
    name = "model.layers.2.mlp.down_proj.weight"
    for selected in ({low_rank_form(name)}, {name}, {low_rank_form(name)}, {"model.norm.weight"}):
        loop.model.eval()
        before = outputs(loop.model, "llama")
        base = loop.model.get_base_model()
        placement = find_placement(OptimizerSetup([loop.optimizer]), base, "default")
        apply_selection(base, "default", frozenset(selected), [loop.optimizer], placement)
        assert torch.equal(outputs(loop.model, "llama"), before)
        trained = {n for n, p in loop.model.named_parameters() if p.requires_grad}
        assert len(trained) == len(selected) + sum(map(is_low_rank, selected))
        loop.model.train()
        loop.run(2)
        assert not torch.equal(outputs(loop.model, "llama"), before)
    assert {name, low_rank_form(name)} <= loop.model.peft_config["default"].tensors.keys()
    assert allocator.selection is not None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-tied", "t5", "mixture"])
def test_both_forms_save_load_merge_and_convert(kind, tmp_path):
    loop = run(kind, steps=12)
    model = loop.model.eval()
    expected = outputs(model, kind)
    model.save_pretrained(tmp_path)
    in_file = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("weight_low_rank_A") for name in in_file)
    loaded = PeftModel.from_pretrained(make_model(kind), tmp_path)
    assert torch.equal(outputs(loaded, kind), expected)

    base = outputs(make_model(kind), kind)
    loaded.merge_adapter()
    torch.testing.assert_close(outputs(loaded, kind), expected, rtol=1e-4, atol=1e-4)
    loaded.unmerge_adapter()
    assert torch.equal(outputs(loaded, kind), expected)
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded, kind), base)
    patched = make_model(kind)
    patched.load_state_dict(export_tensors(loaded), strict=False)
    torch.testing.assert_close(outputs(patched.eval(), kind), expected, rtol=1e-4, atol=1e-4)

    names = model.peft_config["default"].tensors
    updated = [tensor_of(name) for name in names if is_low_rank(name) and tensor_of(name) not in names]
    _, state_dict, _ = convert_to_lora(loaded, rank=2)
    for key in (name.removesuffix(".weight") for name in updated):
        factor_a, factor_b = (state_dict[f"base_model.model.{key}.lora_{factor}.weight"] for factor in "AB")
        delta = layers(loaded.get_base_model())[key].get_delta_weight("default")
        product = (factor_b @ factor_a).T if kind == "gpt2" else factor_b @ factor_a  # GPT-2's Conv1D is transposed
        torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-5)
    assert updated


def test_the_file_is_as_small_as_that_of_lora(tmp_path):
    loop = run(low_rank="only", r=2, steps=4, rho=0.75, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    loop.model.save_pretrained(tmp_path / "ours")
    modules = sorted({name.removesuffix(".weight") for name in loop.selection.low_rank})
    lora = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=modules))
    lora.save_pretrained(tmp_path / "lora")
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("ours", "lora"))
    assert len(modules) > 5 and ours <= 1.1 * theirs


def test_two_passes_are_probed_and_the_second_batch_judges():
    loop = run(steps=1)
    assert loop.selection is None
    loop.run(1)
    assert loop.selection is None  # one batch has been seen
    loop.run(1)
    allocator = allocator_of(loop.model.get_base_model())
    assert loop.selection.low_rank and any(value < 0 for value in allocator.importances.values())


def test_where_everything_fits_one_pass_is_enough():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.95, low_rank="only", r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        loss = model(**make_batch("llama", seed=step)).loss  # it keeps the graph, and with it the probe open
        loss.backward()
        assert model.base_model.selection is None
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    everything = profile(make_model("llama"), make_batch("llama"), r=2).dearest_forms
    assert model.base_model.selection.tensors == set(map(tensor_of, everything))
    assert len(model.base_model.selection.low_rank) == 22


def test_importance_is_the_same_with_and_without_factors():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, low_rank="only", r=2, reselect=2))
    loop = Loop(model, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-9, weight_decay=0))
    measured = []
    for _ in range(2):
        while loop.selection is None or allocator_of(model.get_base_model()).importances in measured:
            loop.step(make_batch("llama", seed=(0, 0, 1)[loop.steps % 3]))
        measured.append(allocator_of(model.get_base_model()).importances)
    factored = [name for name in model.peft_config["default"].tensors if is_low_rank(name)]
    assert len(factored) > 5
    for name in factored:
        assert measured[1][name] == pytest.approx(measured[0][name], rel=0.05, abs=1e-12)


class Linears(nn.Module):
    """Nothing but linear modules without a bias."""

    def __init__(self, penalty=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.penalty = penalty

    def forward(self, x):
        x = x.requires_grad_(self.penalty)
        loss = self.c(self.b(self.a(x).relu()).relu()).square().mean()
        if self.penalty:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = loss + 0 * grad.sum()
        return {"loss": loss}


def select_among(model, low_rank, steps=3):
    config = GreenTrainerConfig(rho=0.8, low_rank=low_rank, r=2, target_modules=["a", "b", "c"])
    loop = Loop(get_peft_model(model, config))
    for seed in range(steps):
        loop.step({"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))})
    return allocator_of(loop.model.get_base_model())


def test_a_model_that_offers_low_rank_forms_alone_is_probed():
    allocator = select_among(Linears(), low_rank="only")
    assert allocator.selection.low_rank and allocator.selection.ratio < 0.8


def test_gradients_in_a_penalty_are_no_batch_of_their_own():
    plain, penalized = (select_among(Linears(penalty), low_rank="also").importances for penalty in (False, True))
    assert len(plain) == 6 and penalized == pytest.approx(plain)


def test_what_a_penalty_runs_depends_on_nothing_else_that_is_trained():
    graph = profile(Linears(penalty=True), {"x": torch.randn(4, 8)}, r=2)
    needs = graph.needs[graph.rows(["b.weight_low_rank"])[0]]
    its_own = needs & (graph.needs.sum(axis=0) == 1) & (graph.condition < 0)
    product = 2 * 4 * 8 * 2  # of 4 rows, of 8 numbers each, with a factor of rank 2
    # Forward; in the penalty and in the backward pass the gradients of both factors and of what is between them; and in the
    # penalty that of the input too.
    assert graph.costs[its_own].sum() == (2 + 2 * 3 + 1) * product


def test_new_factors_are_the_same_on_every_rank_and_change_nothing():
    loops = [run(steps=4) for _ in range(2)]
    values = [dict(loop.model.named_parameters()) for loop in loops]
    name = next(name for name in values[0] if name.endswith("_low_rank_A"))
    assert torch.equal(*(value[name] for value in values))
    for tensor in factors(low_rank_form("weight")):
        assert any(name.endswith(tensor) for name in values[0])
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(low_rank="only"))
    assert torch.equal(outputs(model.eval(), "llama"), outputs(make_model("llama"), "llama"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low_rank": 8}, "low_rank must be False, 'also' or 'only'"),
        ({"low_rank": "all"}, "low_rank must be"),
        ({"low_rank": True}, "low_rank must be"),
        ({"low_rank": "also", "r": 8, "low_rank_lr": 0}, "low_rank_lr must be positive"),
        ({"low_rank": "only", "r": 0}, "r must be a rank"),
        ({"low_rank": "also", "r": 8, "unit": "seconds"}, "known in FLOPs only"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        GreenTrainerConfig(**options)


def test_low_rank_forms_have_no_seconds():
    with pytest.raises(ValueError, match="known in FLOPs only"):
        profile(make_model("llama"), make_batch("llama"), unit="seconds", r=2)


class Gated(nn.Module):
    """Linear modules that are called by keyword, and one that gives more than a product."""

    class Router(nn.Linear):
        def forward(self, hidden):
            logits = super().forward(hidden)
            return logits, logits.softmax(-1)

    def __init__(self):
        super().__init__()
        self.first, self.router, self.last = nn.Linear(6, 6), self.Router(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        logits, weights = self.router(hidden=self.first(input=x))
        return {"loss": self.last(logits * weights).square().mean()}


def test_linear_modules_that_are_called_otherwise():
    torch.manual_seed(0)
    batch = {"x": torch.randn(5, 6)}
    graph = profile(Gated(), batch, r=2)
    assert [name for name in graph.tensors if is_low_rank(name)] == ["last.weight_low_rank"]
    for low_rank in (False, "also"):
        model = get_peft_model(Gated(), GreenTrainerConfig(rho=0.9, low_rank=low_rank, r=2))
        loop = Loop(model)
        for _ in range(4):
            loop.step(batch)
        assert loop.selection.ratio <= 0.9


def test_a_file_with_updates_is_refused_without_its_config(tmp_path):
    loop = run(steps=4)
    loop.model.save_pretrained(tmp_path)
    config = GreenTrainerConfig.from_pretrained(tmp_path)
    config.low_rank = False
    with pytest.raises(ValueError, match="low_rank is False here: load it with the config"):
        PeftModel.from_pretrained(make_model("llama"), tmp_path, config=config)


def test_an_optimizer_without_a_learning_rate():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, low_rank="also", r=2))
    loop = Loop(model, make_optimizer=Adafactor).run(4)
    assert loop.selection.low_rank
