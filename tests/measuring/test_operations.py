"""What was recorded adds up, for any set of tensors, also after it was saved and loaded."""

import json

import pytest
import torch

from peft_greentrainer.measuring.operations import Operations


def chain():
    """Two layers: `out` needs its own product; `in` needs that the gradient is passed on, and its own."""
    operations, grad = Operations(), torch.ones(2)
    operations.forward_cost = 100
    operations.inherit(grad, operations.new_operation(10))
    operations.mark("out", grad)
    passed_on = torch.ones(2)
    operations.inherit(passed_on, operations.new_operation(20))
    of_input = torch.ones(2)
    operations.inherit(of_input, operations.ancestors(passed_on) | operations.new_operation(30))
    operations.mark("in", of_input)
    return operations, passed_on


def test_costs_of_sets():
    graph = chain()[0].graph(["in", "out"])
    assert graph.tensors == ("in", "out") and graph.unit == "flops"
    costs = [graph.cost(names) for names in ([], ["out"], ["in"], ["in", "out"])]
    assert costs == [100, 110, 150, 160] and graph.full_cost == 160


def test_a_tensor_is_told_by_its_views():
    operations, grad = Operations(), torch.ones(4)
    operation = operations.new_operation(1)
    operations.inherit(grad[:2], operation)
    assert operations.ancestors(grad) == operations.ancestors(grad[2:]) == operation
    assert Operations().ancestors(grad) == 0  # each has attributes of its own


def test_what_every_step_runs():
    forced, passed_on = chain()
    forced.force(passed_on)
    graph = forced.graph(["in", "out"])
    assert (graph.cost(["out"]), graph.cost(["in"]), graph.forced_cost) == (130, 150, 20)
    charged, passed_on = chain()
    charged.charge_always(passed_on)
    graph = charged.graph(["in", "out"])
    assert (graph.cost([]), graph.cost(["in", "out"]), graph.forced_cost) == (120, 160, 0)


def test_what_some_steps_run():
    operations, passed_on = chain()
    out = operations.needed_by["out"]
    operations.run_only_unless(operations.ancestors(passed_on), out)
    graph = operations.graph(["in", "out"])
    assert (graph.cost(["in"]), graph.cost(["in", "out"])) == (150, 140)
    operations.run_only_if(operations.ancestors(passed_on), out)
    graph = operations.graph(["in", "out"])
    assert (graph.cost(["in"]), graph.cost(["in", "out"])) == (130, 160)


def test_operations_that_run_as_one():
    operations, _ = chain()
    operations.run_as_one(operations.needed_by["in"])
    assert operations.costs[1:] == [10, 50, 0]


def test_updates_are_no_part_of_full_fine_tuning():
    operations, passed_on = chain()
    operations.added, operations.added_forward_cost = operations.ancestors(passed_on), 5
    graph = operations.graph(["in", "out"])
    assert (graph.full_cost, graph.cost(["in", "out"])) == (135, 160)
    graph = operations.graph(["in", "out"], has_updates=False)
    assert (graph.full_cost, graph.cost(["in", "out"])) == (135, 135)


def test_the_graph_of_several_steps_is_their_mean():
    graph = chain()[0].graph(["in", "out"], steps=10)
    assert (graph.cost([]), graph.cost(["in"]), graph.full_cost) == (10, 15, 16)


def test_a_forward_pass_that_is_taken_back():
    operations, _ = chain()
    before = operations.forward
    operations.forward_cost += 7
    operations.added_forward_cost += 3
    operations.take_back(operations.forward - before)
    assert operations.forward == before


def test_recording_goes_on_from_a_state():
    operations, passed_on = chain()
    operations.force(passed_on)
    operations.run_only_if(operations.needed_by["in"], operations.needed_by["out"])
    operations.added = operations.needed_by["out"]
    loaded = Operations()
    loaded.load_state_dict(json.loads(json.dumps(operations.state_dict())))
    assert loaded.state_dict() == operations.state_dict()
    assert loaded.new_operation(1) == operations.new_operation(1)
    for names in ([], ["out"], ["in"], ["in", "out"]):
        assert loaded.graph(["in", "out"]).cost(names) == operations.graph(["in", "out"]).cost(names)


def test_candidates_without_a_gradient_are_left_out():
    operations, _ = chain()
    assert operations.graph(["out", "unused"]).tensors == ("out",)
    with pytest.raises(ValueError, match="reaches no candidate tensor"):
        operations.graph(["unused"])
