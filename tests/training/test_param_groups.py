"""The optimizer's groups are the user's: which group a tensor joins, which optimizer takes it, and whether it moves."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Adafactor, Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig
from peft_greentrainer.training.acceptance import TensorKind, accepts
from peft_greentrainer.training.allocator import allocator_of


VISION, LANGUAGE = 1e-4, 1e-2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + torch.tanh(self.mix(self.norm(hidden)))


class Towers(nn.Module):
    """Vision layers under language layers."""

    def __init__(self, sparse=False):
        super().__init__()
        self.vision = nn.ModuleList(Block() for _ in range(3))
        self.words = nn.Embedding(32, 16, sparse=sparse)
        self.language = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, images, words, labels):
        hidden = images
        for block in self.vision:
            hidden = block(hidden)
        hidden = hidden + self.words(words)
        for block in self.language:
            hidden = block(hidden)
        return {"loss": cross_entropy(self.head(hidden), labels)}


def batch_of(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 16, generator=generator)
    words = torch.randint(0, 32, (rows,), generator=generator)
    return {"images": images, "words": words, "labels": torch.arange(rows) % 5}


def towers(sparse=False):
    torch.manual_seed(0)
    return Towers(sparse)


def adapted(base=None, **options):
    return get_peft_model(base or towers(), GreenTrainerConfig(**{"rho": 0.95, "reselect": 3} | options))


def values(model):
    """What is trained, by the name of its tensor in the base model."""
    return {
        name.removeprefix("base_model.model.").replace("greentrainer_values.default.", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def two_rates(parameters, make=torch.optim.AdamW):
    """Groups by name, as users make them."""
    parameters = list(parameters)
    vision = [p for name, p in parameters if "vision." in name]
    language = [p for name, p in parameters if "vision." not in name]
    return make([{"params": vision, "lr": VISION}, {"params": language, "lr": LANGUAGE}], weight_decay=0.0)


def run(model, optimizer, steps=6, check=None, **options):
    """A plain loop; `check(moved)` gets by how much each selected tensor has moved in every step."""
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in values(model).items()}
        model(**batch_of(step))["loss"].backward()
        for each in optimizers:
            each.step()
        moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in values(model).items()}
        model.base_model.update_and_allocate(step, optimizer, **options)
        for each in optimizers:
            each.zero_grad()
        if check is not None:
            check(moved)
    return moved


def selected_now(model):
    return set(model.base_model.selection.tensors)


def group_of_each(optimizers, model):
    """The groups that have a trained tensor, by its name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {name: [g for g in groups if any(p is q for q in g["params"])] for name, p in values(model).items()}


# Groups by name


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "values and base tensors apart"])
def test_a_tensor_joins_the_group_of_its_base_tensor(when):
    base = towers()
    plain = copy.deepcopy(base)
    if when == "before wrapping":
        optimizer = two_rates(base.named_parameters())
        model = adapted(base)
    else:
        model = adapted(base)
        named = list(model.named_parameters())
        if when != "after wrapping":
            named.sort(key=lambda item: not item[1].requires_grad)
        optimizer = two_rates(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, optimizer, steps=2)
    assert any(name.startswith("vision.") for name in selected_now(model))

    # The first step of AdamW moves what has a gradient by the learning rate of its group: in the plain model, too.
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer_of_plain = two_rates(plain.named_parameters())
    plain(**batch_of(7))["loss"].backward()
    optimizer_of_plain.step()
    expected = {name: (p - before[name]).abs().max().item() for name, p in plain.named_parameters()}
    start = {name: p.detach().clone() for name, p in values(model).items()}
    assert start.keys() == selected_now(model)
    fresh = {name for name, p in values(model).items() if p not in optimizer.state}
    model(**batch_of(7))["loss"].backward()
    optimizer.step()
    assert any(name.startswith("vision.") for name in fresh)
    for name in fresh:
        moved = (values(model)[name] - start[name]).abs().max().item()
        assert moved == pytest.approx(expected[name], rel=1e-2), name


def test_importance_is_at_the_learning_rate_of_the_tensors_own_group():
    model = adapted()
    run(model, two_rates(model.named_parameters(), partial(torch.optim.AdamW, eps=1e-8)), steps=1)
    base = towers()
    with torch.no_grad():
        for name, p in values(model).items():
            base.get_parameter(name).copy_(p)
    optimizer = two_rates(model.named_parameters())
    model(**batch_of(1))["loss"].backward()
    model.base_model.update_and_allocate(1, optimizer)
    base(**batch_of(1))["loss"].backward()
    measured = allocator_of(model.get_base_model()).importances
    for name, p in base.named_parameters():
        rate = VISION if name.startswith("vision.") else LANGUAGE
        assert measured[name] == pytest.approx(rate * p.grad.abs().sum().item(), rel=1e-3)


def test_without_a_known_place_a_tensor_is_left_out_by_name():
    """Only what is provisionally trained is in the groups, and that is language: where vision belongs no one can know."""
    model = adapted(rho=0.6)
    optimizer = two_rates((name, p) for name, p in model.named_parameters() if p.requires_grad)
    assert not optimizer.param_groups[0]["params"]
    model.peft_config["default"].rho = 1.0
    with pytest.warns(
        UserWarning, match=r"never selected: .*vision.*no group has it.*model.named_parameters\(\).*group_of"
    ):
        run(model, optimizer, steps=3)
    assert selected_now(model) and not any(name.startswith("vision.") for name in selected_now(model))
    assert not optimizer.param_groups[0]["params"]


def test_layerwise_rates_are_never_mistaken_for_one_another():
    model = adapted(rho=0.7, reselect=1)
    rates = {
        f"{tower}.{i}.": 1e-4 * 2 ** (3 * (tower == "language") + i)
        for tower in ("vision", "language")
        for i in (0, 1, 2)
    }
    rates |= {"head.": 1e-2, "words.": 1e-3}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if part in name], "lr": lr} for part, lr in rates.items()]
    for given in (groups, [g for g in groups if g["params"]]):
        same = copy.deepcopy(model)
        of_same = dict(zip(map(id, model.parameters()), same.parameters()))
        optimizer = torch.optim.AdamW([g | {"params": [of_same[id(p)] for p in g["params"]]} for g in given])
        same.peft_config["default"].rho = 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(same, optimizer, steps=4)
        assert selected_now(same)
        for name, found in group_of_each([optimizer], same).items():
            assert [g["lr"] for g in found] == [next(lr for part, lr in rates.items() if part in name)], name


def test_with_base_tensors_in_the_groups_what_the_user_left_out_stays_out():
    base = towers()
    optimizer = torch.optim.AdamW([p for name, p in base.named_parameters() if "vision" not in name])
    model = adapted(base, rho=1.0)
    with pytest.warns(UserWarning, match="never selected: vision"):
        run(model, optimizer)
    assert selected_now(model) == {name for name, _ in towers().named_parameters() if "vision" not in name}


def test_names_in_groups_stay_those_of_the_users_model():
    model = adapted()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": named, "lr": 1e-3}])
    run(model, optimizer)
    (group,) = optimizer.param_groups
    name_of = {id(p): name for name, p in model.named_parameters()}
    assert group["param_names"] == [name_of[id(p)] for p in group["params"]]
    assert {id(p) for p in values(model).values()} <= {id(p) for p in group["params"]}


def test_a_deselected_tensor_keeps_its_place():
    model = adapted(rho=0.5, reselect=1)
    optimizer = two_rates(model.named_parameters())
    seen = {}
    for step in range(8):
        run(model, optimizer, steps=1 + step % 2)
        for name, (group,) in group_of_each([optimizer], model).items():
            assert seen.setdefault(name, group["lr"]) == group["lr"]
        places = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        order = [id(p) for p in model.parameters()]
        for place in places:
            assert place == sorted(place, key=order.index) and len(place) == len(set(place))


# Optimizers


def muon_and_adamw(parameters):
    parameters = list(parameters)
    two = [p for p in parameters if p.dim() == 2]
    return [torch.optim.Muon(two, lr=1e-2), torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=1e-3)]


@pytest.mark.parametrize("given", ["base tensors", "what requires grad"])
def test_several_optimizers_have_each_its_own(given):
    model = adapted(reselect=2)
    optimizers = muon_and_adamw(p for p in model.parameters() if p.requires_grad or given == "base tensors")
    for step in range(7):
        run(model, optimizers, steps=1)
        model.base_model.update_and_allocate(step, optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, optimizers)
    assert selected_now(model)
    assert {p.dim() for g in optimizers[0].param_groups for p in g["params"]} == {2}
    assert all(p.dim() != 2 for g in optimizers[1].param_groups for p in g["params"])
    for name, groups in group_of_each(optimizers, model).items():
        assert len(groups) == 1, name
    if given == "base tensors":
        assert {values(model)[name].dim() for name in selected_now(model)} == {1, 2}


def test_muon_alone_trains_what_it_takes_and_names_the_rest():
    model = adapted(rho=1.0)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.dim() == 2], lr=1e-2)
    with pytest.warns(UserWarning, match="never selected: .*norm.*no optimizer at hand takes such a tensor"):
        run(model, optimizer)
    expected = {name for name, p in towers().named_parameters() if p.dim() == 2}
    assert selected_now(model) == expected
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in values(model).values()}


def test_low_rank_factors_are_two_dimensional():
    model = adapted(rho=0.9, low_rank="only", r=2)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.dim() == 2], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, optimizer)
    assert allocator_of(model.get_base_model()).selection.low_rank
    assert all(p in optimizer.state for p in values(model).values())


def test_where_no_optimizer_takes_anything_it_is_said():
    model = adapted(target_modules=[r"norm"])
    optimizer = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="No candidate can be trained: .*norm.*no optimizer at hand takes"):
        model.base_model.update_and_allocate(0, optimizer)


def test_a_tensor_of_another_optimizer_is_not_stepped_twice():
    model = adapted(rho=1.0)
    named = list(model.named_parameters())
    mine = torch.optim.AdamW([p for name, p in named if p.requires_grad and "vision" not in name], lr=1e-2)
    others = torch.optim.AdamW([p for name, p in named if "vision" in name], lr=1e-4)
    with pytest.warns(
        UserWarning, match="never selected: vision.*another optimizer has it, which was not handed over"
    ):
        for step in range(6):
            model(**batch_of(step))["loss"].backward()
            mine.step()
            others.step()
            model.base_model.update_and_allocate(step, mine)
            mine.zero_grad()
            others.zero_grad()
    assert selected_now(model) == {name for name, _ in towers().named_parameters() if "vision" not in name}
    mine_now = {id(p) for g in mine.param_groups for p in g["params"]}
    assert not mine_now & {id(p) for g in others.param_groups for p in g["params"]}


def test_no_tensor_takes_more_steps_than_there_were():
    model = adapted(rho=1.0, reselect=2)
    trainable = [p for p in model.parameters() if p.requires_grad]
    halves = [torch.optim.AdamW(trainable[::2], lr=1e-2), torch.optim.AdamW(trainable[1::2], lr=1e-3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            model(**batch_of(step))["loss"].backward()
            for optimizer in halves:
                optimizer.step()
            model.base_model.update_and_allocate(step, halves[0])
            model.zero_grad()
    counts = [s["step"].item() for optimizer in halves for s in optimizer.state.values()]
    assert max(counts) <= 6
    both = [{id(p) for g in optimizer.param_groups for p in g["params"]} for optimizer in halves]
    assert not both[0] & both[1]


def test_optimizers_of_an_earlier_training_do_not_count():
    base = towers()
    earlier = torch.optim.AdamW(base.parameters(), lr=1e-3)
    base(**batch_of(0))["loss"].backward()
    earlier.step()  # full fine-tuning, once
    base.zero_grad()
    model = adapted(base, rho=1.0)
    first = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, first)
    second = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, second)
    assert selected_now(model) == dict(towers().named_parameters()).keys()
    assert earlier.param_groups and first.param_groups


def test_sparse_gradients_go_to_who_takes_them():
    model = adapted(towers(sparse=True), rho=1.0)
    named = list(model.named_parameters())
    optimizers = [
        torch.optim.SparseAdam([p for name, p in named if "words" in name], lr=1e-2),
        torch.optim.AdamW([p for name, p in named if "words" not in name], lr=1e-3),
    ]
    run(model, optimizers)
    assert selected_now(model) == dict(towers().named_parameters()).keys()
    assert group_of_each(optimizers, model)["words.weight"] == optimizers[0].param_groups

    model = adapted(towers(sparse=True), rho=1.0)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad and "words" not in n])
    with pytest.warns(UserWarning, match=r"never selected: words.weight \(no optimizer at hand takes"):
        run(model, optimizer)
    assert "words.weight" not in selected_now(model)


class MuonWithAdam(torch.optim.Optimizer):
    """One class for both, with a flag in its groups, and a check that comes as late as the step."""

    def __init__(self, groups):
        for group in groups:
            assert set(group) >= {"params", "use_muon", "lr"}
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    assert p.dim() == 2 or not group["use_muon"]
                    p.sub_(group["lr"] * p.grad.sign())


class Unmakeable(MuonWithAdam):
    """The same, of which no other can be made without an argument that is not kept."""

    def __init__(self, groups, world):
        super().__init__(groups)


@pytest.mark.parametrize("make", [MuonWithAdam, partial(Unmakeable, world=1)])
def test_groups_with_a_flag(make):
    model = adapted(rho=0.95)
    named = [p for p in model.parameters() if p.requires_grad]
    two, other = [p for p in named if p.dim() == 2], [p for p in named if p.dim() != 2]
    optimizer = make([{"params": two, "use_muon": True, "lr": 1e-2}, {"params": other, "use_muon": False, "lr": 1e-3}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, optimizer)
    muon, adam = optimizer.param_groups
    assert {p.dim() for p in muon["params"]} == {2} and {p.dim() for p in adam["params"]} == {1}
    assert all(len(groups) == 1 for groups in group_of_each([optimizer], model).values())


def test_what_optimizers_take():
    kinds = [TensorKind.from_tensor(torch.ones([2] * n)) for n in (0, 1, 2, 3, 4)]
    parameters = [nn.Parameter(torch.ones(4, 4))]
    for name, found in vars(torch.optim).items():
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer:
            optimizer = found(parameters)
            expected = {"Muon": [2], "SparseAdam": []}.get(name, [0, 1, 2, 3, 4])
            assert [k.dimensions for k in kinds if accepts(optimizer, optimizer.param_groups[0], k)] == expected, name
    optimizers = [
        Adafactor(parameters),
        torch.optim.AdamW(parameters, fused=True),
        torch.optim.SGD(parameters, momentum=0.9),
    ]
    decayed = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": 0.1}, {"params": [nn.Parameter(torch.ones(4))]}]
    )
    for optimizer in (*optimizers, decayed):
        for group in optimizer.param_groups:
            assert all(accepts(optimizer, group, kind) for kind in kinds)


def test_a_list_with_accelerate():
    model = adapted(reselect=2)
    optimizers = muon_and_adamw(model.parameters())
    prepared = Accelerator(cpu=True).prepare(*optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Importance is that of the update")
        run(model, list(prepared))
    assert selected_now(model)
    assert all(len(groups) == 1 for groups in group_of_each(optimizers, model).values())


def test_each_tensor_by_the_rule_of_its_own_optimizer():
    model = adapted()
    named = list(model.named_parameters())
    sgd = torch.optim.SGD([p for name, p in named if "vision" in name], lr=0.5)
    adam = torch.optim.AdamW([p for name, p in named if "vision" not in name], lr=1e-2)
    model.base_model.update_and_allocate(0, [sgd, adam])
    model(**batch_of(1))["loss"].backward()
    model.base_model.update_and_allocate(1, [sgd, adam])
    base = towers()
    base(**batch_of(1))["loss"].backward()
    for name, p in base.named_parameters():
        expected = 0.5 * p.grad.square().sum() if "vision" in name else 1e-2 * p.grad.abs().sum()
        assert allocator_of(model.get_base_model()).importances[name] == pytest.approx(expected.item(), rel=1e-3)


# The user's own rule


def test_the_users_rule_says_where_a_tensor_belongs():
    model = adapted(rho=0.6)
    model.peft_config["default"].rho = 1.0
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trainable, "lr": LANGUAGE}, {"params": [], "lr": VISION}], weight_decay=0.0
    )
    asked = {}

    def group_of(name, tensor):
        asked[name] = tensor
        if name.startswith("words."):
            return None
        return optimizer.param_groups[1 if name.startswith("vision.") else 0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, optimizer, group_of=group_of)
    base = towers()
    assert asked.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(tensor, base.get_parameter(name)) for name, tensor in asked.items())
    assert selected_now(model) == asked.keys() - {"words.weight"}
    vision = {name for name, (group,) in group_of_each([optimizer], model).items() if group["lr"] == VISION}
    assert vision and all(name.startswith("vision.") for name in vision)


def test_a_rule_that_names_no_group_or_the_wrong_one_is_refused():
    model = adapted()
    optimizers = muon_and_adamw(model.parameters())
    for rule, message in (
        (lambda name, tensor: "vision", "group_of must return one of the param_groups"),
        (lambda name, tensor: dict(optimizers[1].param_groups[0]), "group_of must return one of the param_groups"),
        (lambda name, tensor: optimizers[0].param_groups[0], "takes|does not take it"),
    ):
        fresh = adapted()
        with pytest.raises(ValueError, match=message):
            fresh.base_model.update_and_allocate(0, optimizers, group_of=rule)


def test_the_rule_in_the_trainer(tmp_path):
    data = [{k: v[0] for k, v in batch_of(seed, rows=1).items()} for seed in range(24)]
    model = adapted(rho=0.6)
    model.peft_config["default"].rho = 1.0
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": LANGUAGE}, {"params": [], "lr": VISION}]
    )
    arguments = TrainingArguments(tmp_path, max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    callback = GreenTrainerCallback(group_of=lambda name, tensor: optimizer.param_groups["vision" in name])
    Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)).train()
    assert selected_now(model) == dict(towers().named_parameters()).keys()
    groups = group_of_each([optimizer], model)
    of_vision = {name for name, (group,) in groups.items() if group is optimizer.param_groups[1]}
    assert of_vision and all(name.startswith("vision.") for name in of_vision)


# Whether a tensor moves


NOT_MOVED = "have a gradient and did not move"


def in_hooks(parameters):
    """One optimizer for each tensor, that steps as its gradient is there."""
    for p in parameters:
        optimizer = torch.optim.SGD([p], lr=1e-2)

        def take(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(take)


@pytest.mark.parametrize("kept", [False, True])
def test_an_optimizer_that_steps_in_gradient_hooks_is_noticed(kept):
    """With and without a tensor that was trained before and still is."""
    model = adapted(rho=0.6, reselect="once")
    model.peft_config["default"].rho = 1.0
    trainable = [p for p in model.parameters() if p.requires_grad]
    in_hooks(trainable if kept else [])
    optimizer = torch.optim.SGD(trainable, lr=1e-2)  # handed over, and never called
    with pytest.warns(UserWarning, match=f"{NOT_MOVED}.*steps in gradient hooks"):
        for step in range(7):
            model(**batch_of(step))["loss"].backward()
            model.base_model.update_and_allocate(step, optimizer)
            optimizer.zero_grad()


def test_a_learning_rate_of_zero_in_one_group_is_noticed():
    model = adapted(rho=1.0, reselect="once")
    optimizer = two_rates(model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.warns(
        UserWarning, match=rf"{NOT_MOVED} in a step: vision[^;]*\(the learning rate of their group is 0\)"
    ):
        run(model, optimizer, steps=4)


def test_values_that_are_too_coarse_are_noticed():
    model = get_peft_model(
        towers().to(torch.bfloat16), GreenTrainerConfig(rho=1.0, reselect="once"), autocast_adapter_dtype=False
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    with pytest.warns(UserWarning, match=f"{NOT_MOVED}.*norm.weight.*too coarse for a learning rate of 1e-05"):
        for step in range(4):
            batch = batch_of(step)
            model(**batch | {"images": batch["images"].bfloat16()})["loss"].backward()
            optimizer.step()
            model.base_model.update_and_allocate(step, optimizer)
            optimizer.zero_grad()


def test_each_tensor_is_told_of_once():
    model = adapted(rho=1.0, reselect=2)
    optimizer = two_rates(model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, optimizer, steps=10)
    assert sum(NOT_MOVED in str(w.message) for w in caught) == 1


def plain_step(model, optimizer, step):
    model(**batch_of(step))["loss"].backward()
    optimizer.step()


def accumulated(model, optimizer, step):
    for micro in range(3):
        model(**batch_of(3 * step + micro))["loss"].backward()
    optimizer.step()


class Micro:
    """`update_and_allocate` after every micro-batch, of which every fifth is followed by a step."""

    def __call__(self, model, optimizer, step):
        if step % 5 == 0:
            optimizer.zero_grad()
        model(**batch_of(step))["loss"].backward()
        if step % 5 == 4:
            optimizer.step()

    zeroes = True


class Overflowing:
    """A scaler leaves out every third step."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000, backoff_factor=2.0**-126)

    def __call__(self, model, optimizer, step):
        self.scaler.scale(model(**batch_of(step))["loss"]).backward()
        self.scaler.step(optimizer)
        self.scaler.update(2.0**126 if step % 3 == 1 else 1.0)


def warming_up(model, optimizer, step):
    optimizer.param_groups[0]["lr"] = 0.0 if step < 6 else 1e-2
    plain_step(model, optimizer, step)


def at_the_end_of_a_schedule(model, optimizer, step):
    optimizer.param_groups[0]["lr"] = 1e-2 if step < 2 else 1e-12
    plain_step(model, optimizer, step)


@pytest.mark.parametrize(
    "take", [plain_step, accumulated, Micro(), Overflowing(), warming_up, at_the_end_of_a_schedule]
)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"low_rank": "also", "r": 2}),
        (torch.optim.SGD, {"rho": 0.5, "reselect": 2}),
    ],
    ids=str,
)
def test_what_moves_is_not_told_of(take, make, options):
    model = adapted(**options)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(16):
            take(model, optimizer, step)
            model.base_model.update_and_allocate(step, optimizer)
            if not getattr(take, "zeroes", False):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert not [str(w.message) for w in caught if NOT_MOVED in str(w.message)]
    assert model.base_model.selection is not None


def test_the_trainers_warm_up_and_accumulation_are_not_told_of(tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, reselect=2))
    batch = make_batch("llama", rows=24)
    data = [{name: value[i] for name, value in batch.items()} for i in range(24)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=4,
        report_to=[],
        use_cpu=True,
        weight_decay=0.1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model, arguments, train_dataset=data, callbacks=[GreenTrainerCallback()]).train()
    assert not [str(w.message) for w in caught if NOT_MOVED in str(w.message) or "never selected" in str(w.message)]


def test_following_leaves_no_trace():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, reselect="once"))
    loop = Loop(model)
    loop.run(2)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    watch = allocator_of(model.get_base_model())._watch
    assert watch._followed
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not allocator_of(same.get_base_model())._watch._followed
        same(**make_batch("llama")).loss.backward()
        assert not watch._noted
    loop.run(1)
    assert not watch._followed  # all have moved


@pytest.mark.parametrize("given", ["adam", [], None, ["adam"], 1e-3], ids=str)
def test_what_is_no_optimizer_is_refused_with_advice(given):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.7))
    with pytest.raises(ValueError, match="takes the optimizer that trains the model, or a list of all of them"):
        model.base_model.update_and_allocate(0, given)
