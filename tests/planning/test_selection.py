"""The selection keeps its budget, and is the best there is, or nearly."""

import itertools

import numpy as np
import pytest
from helpers.models import make_batch, make_model
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from peft_greentrainer import CostGraph, profile, select
from peft_greentrainer.planning.closures import most_valuable
from peft_greentrainer.tensors.names import tensor_of


# Chains, and what is none: biases that all layers share, a parallel residual, cross-attention, a mixer, experts side by
# side, factors beside whole tensors, two towers.
KINDS = [
    "llama",
    "gpt2",
    "bert",
    "t5",
    "t5-fused",
    "mixture",
    "mamba2",
    "gpt-neox",
    "bart",
    "jamba",
    "experts",
    "lora",
    "clip",
]


@pytest.fixture(scope="module", params=KINDS)
def graph(request):
    return profile(make_model(request.param), make_batch(request.param))


def heavy_tailed(graph, seed):
    values = np.random.default_rng(seed).lognormal(0, 2, len(graph.tensors))
    return dict(zip(graph.tensors, values.tolist()))


def chain(n, seed):
    """The graph of n tensors in a row: own operations, and the activation gradients of all that come after."""
    random = np.random.default_rng(seed)
    needs = np.concatenate([np.triu(np.ones((n, n), dtype=bool), 1), np.eye(n, dtype=bool)], axis=1)
    costs = random.integers(1, 10**9, 2 * n)
    forward = int(costs[n:].sum())
    return CostGraph(tuple(f"t{i}" for i in range(n)), forward, forward + int(costs @ needs.any(axis=0)), costs, needs)


def optimum(graph, importance, rho):
    """The importance of the best selection, by mixed-integer programming: a tensor needs its operations bought, and has one
    form at most."""
    n, c = graph.needs.shape
    row, column = np.nonzero(graph.needs)
    pair = np.arange(len(row))
    needs = coo_array(
        (np.r_[np.ones(len(row)), -np.ones(len(row))], (np.r_[pair, pair], np.r_[row, n + column])),
        shape=(len(row), n + c),
    )
    budget = np.r_[np.zeros(n), graph.costs / graph.full_flops][None]
    tensors, tensor = np.unique([tensor_of(name) for name in graph.tensors], return_inverse=True)
    forms = coo_array((np.ones(n), (tensor, np.arange(n))), shape=(len(tensors), n + c))
    result = milp(
        -np.r_[[importance[name] for name in graph.tensors], np.zeros(c)],
        constraints=[
            LinearConstraint(needs.tocsr(), -np.inf, 0),
            LinearConstraint(forms.tocsr(), -np.inf, 1),
            LinearConstraint(budget, -np.inf, rho - graph.forward_flops / graph.full_flops),
        ],
        integrality=np.ones(n + c),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    assert result.success
    return -result.fun


@pytest.mark.parametrize("rho", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_within_half_a_percent_of_the_optimum(graph, rho):
    for seed in range(3):
        importance = heavy_tailed(graph, seed)
        selection = select(graph, importance, rho)
        assert selection.importance >= 0.995 * optimum(graph, importance, rho)


@pytest.mark.parametrize("rho", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "gpt-neox", "bart", "mixture", "jamba", "mamba2"])
def test_with_two_forms_within_half_a_percent_of_the_optimum(kind, rho):
    graph = profile(make_model(kind), make_batch(kind), r=2)
    for seed in range(2):
        importance = heavy_tailed(graph, seed)
        selection = select(graph, importance, rho)
        assert selection.importance >= 0.995 * optimum(graph, importance, rho)
        assert len(selection.candidates) == len(selection.tensors)


@pytest.mark.parametrize("seed", range(20))
def test_brute_force_on_chains(seed):
    graph = chain(9, seed)
    importance = heavy_tailed(graph, seed)
    for rho in (0.45, 0.6, 0.8):
        subsets = (s for k in range(1, 10) for s in itertools.combinations(graph.tensors, k))
        best = max((sum(importance[t] for t in s) for s in subsets if graph.ratio(s) <= rho), default=None)
        if best is None:
            with pytest.raises(ValueError, match="under the floor"):
                select(graph, importance, rho)
        else:
            # What rounding up the costs may lose: a subset that fits by less than a unit of cost per tensor.
            assert select(graph, importance, rho).importance >= best * (1 - 1e-3)


@pytest.mark.parametrize("seed", range(30))
def test_brute_force_on_any_order(seed):
    random = np.random.default_rng(seed)
    items, operations = 9, 7
    # Each operation needs some of those before it, and each item needs one or two of them.
    closure = np.eye(operations, dtype=bool)
    for i in range(1, operations):
        for j in np.flatnonzero(random.random(i) < 0.4):
            closure[i] |= closure[j]
    shared = np.stack([closure[random.choice(operations, random.integers(1, 3))].any(axis=0) for _ in range(items)])
    needs = np.concatenate([shared, np.eye(items, dtype=bool)], axis=1)
    costs, value = random.integers(1, 1000, operations + items), random.lognormal(0, 2, items)
    for share in (0.3, 0.5, 0.8):
        budget = int(share * costs.sum())
        chosen = most_valuable(needs, costs, value, budget)
        assert costs @ needs[chosen].any(axis=0) <= budget
        subsets = (list(s) for k in range(items + 1) for s in itertools.combinations(range(items), k))
        best = max(value[s].sum() for s in subsets if costs @ needs[s].any(axis=0) <= budget)
        assert value[chosen].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
def test_brute_force_with_one_item_of_each_kind_at_most(seed):
    random = np.random.default_rng(seed)
    kinds, layers = 4, 3
    one_of = np.repeat(np.arange(kinds), 2)
    # Two forms of a tensor need the same of what is shared, and each something of its own.
    shared = np.repeat(random.integers(1, layers + 1, kinds)[:, None] > np.arange(layers), 2, axis=0)
    needs = np.concatenate([shared, np.eye(2 * kinds, dtype=bool)], axis=1)
    costs, value = random.integers(1, 1000, layers + 2 * kinds), random.lognormal(0, 2, 2 * kinds)
    for share in (0.2, 0.4, 0.6):
        budget = int(share * costs.sum())
        chosen = most_valuable(needs, costs, value, budget, one_of)
        assert costs @ needs[chosen].any(axis=0) <= budget and len(set(one_of[chosen])) == len(chosen)
        picks = itertools.product(*[(None, 2 * kind, 2 * kind + 1) for kind in range(kinds)])
        subsets = [[i for i in pick if i is not None] for pick in picks]
        best = max(value[s].sum() for s in subsets if costs @ needs[s].any(axis=0) <= budget)
        assert value[chosen].sum() == pytest.approx(best)


@pytest.mark.parametrize("rho", [0.36, 0.4, 0.5, 0.633, 0.75, 0.9, 0.999])
def test_the_budget_always_holds(graph, rho):
    if rho < graph.floor:
        pytest.skip("under the floor")
    for seed in range(5):
        importance = heavy_tailed(graph, seed)
        selection = select(graph, importance, rho)
        assert selection.tensors
        assert selection.ratio == graph.ratio(selection.tensors) <= rho
        assert selection.importance == pytest.approx(sum(importance[name] for name in selection.tensors))


def test_one_selects_every_candidate(graph):
    selection = select(graph, dict.fromkeys(graph.tensors, 0.0), rho=1.0)
    assert selection.tensors == set(graph.tensors) and selection.ratio == 1


def test_always_is_always_selected_and_counts(graph):
    always = [graph.tensors[-1], graph.tensors[len(graph.tensors) // 2]]
    rho = max(0.7, graph.ratio(always) + 0.05)
    importance = heavy_tailed(graph, 0) | dict.fromkeys(always, 0.0)
    selection = select(graph, importance, rho, always=always)
    assert set(always) <= selection.tensors and selection.ratio <= rho
    with pytest.raises(ValueError, match=f"under the floor of {graph.ratio(always):.4f}.*always"):
        select(graph, importance, graph.ratio(always) - 1e-3, always=always)


def test_always_may_be_everything_that_matters(graph):
    always = [graph.tensors[-1]]
    importance = dict.fromkeys(always, 1.0)
    assert select(graph, importance, rho=0.9, always=always).tensors == set(always)


def test_under_the_floor_names_rho_the_floor_and_the_tensor(graph):
    cheapest = min(graph.tensors, key=lambda name: graph.flops([name]))
    with pytest.raises(ValueError, match=rf"rho=0\.1 .*floor of {graph.floor:.4f}") as error:
        select(graph, heavy_tailed(graph, 0), rho=0.1)
    named = [name for name in graph.tensors if f" {name}," in str(error.value)]
    assert [graph.flops([name]) for name in named] == [graph.flops([cheapest])]


def test_at_the_floor_something_is_selected(graph):
    selection = select(graph, heavy_tailed(graph, 0), rho=np.nextafter(graph.floor, 1))
    assert selection.tensors and selection.ratio <= graph.floor + 1e-9


@pytest.mark.parametrize(
    ("changes", "rho", "match"),
    [
        ({}, 0.0, "rho must be in"),
        ({}, 1.01, "rho must be in"),
        ({"t3": float("nan")}, 0.7, "t3"),
        ({"t3": float("inf")}, 0.7, "t3"),
        ({"t3": -1.0}, 0.7, "t3"),
        ({"other": 1.0}, 0.7, "other"),
        (dict.fromkeys([f"t{i}" for i in range(9)], 0.0), 0.7, "Every importance is zero"),
    ],
)
def test_bad_input(changes, rho, match):
    graph = chain(9, 0)
    with pytest.raises(ValueError, match=match):
        select(graph, heavy_tailed(graph, 0) | changes, rho)


def test_more_budget_never_buys_less(graph):
    importance = heavy_tailed(graph, 3)
    bought = [select(graph, importance, rho).importance for rho in (0.45, 0.55, 0.65, 0.75, 0.85, 0.95)]
    assert all(more >= 0.99 * less for less, more in itertools.pairwise(bought))
