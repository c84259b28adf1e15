"""A probe that reaches less than expected tells what it saw: the next step is probed too, and nothing is half applied."""

import copy
import json
import warnings

import pytest
import torch
import torch.multiprocessing
from peft import get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig, flop_counter
from peft_greentrainer.training.allocator import allocator_of
from peft_greentrainer.training.unreached import PATIENCE


class Captions(nn.Module):
    """Text, with an image in some batches only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16))
        self.merger = nn.Linear(16, 16)
        self.language = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(16, 16)

    def forward(self, text, image=None):
        hidden = text if image is None else text + self.merger(self.vision(image))
        return {"loss": self.head(self.language(hidden)).square().mean()}


def batch(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = {"text": torch.randn(4, 16, generator=generator)}
    return text if kind == "text" else text | {"image": torch.randn(4, 12, generator=generator)}


class Run:
    def __init__(self, **options):
        config = GreenTrainerConfig(**{"rho": 0.8, "modules_to_save": ["merger"], "reselect": "once"} | options)
        self.model = get_peft_model(Captions(), config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.steps = 0

    def step(self, kind):
        self.model(**batch(kind, self.steps))["loss"].backward()
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.steps, self.optimizer)
        self.optimizer.zero_grad()
        self.steps += 1

    def applied(self):
        """All that a selection changes."""
        config = self.model.peft_config["default"]
        return copy.deepcopy(
            (
                config.selected,
                config.provisional,
                list(config.tensors),
                {name for name, p in self.model.named_parameters() if p.requires_grad},
                [len(group["params"]) for group in self.optimizer.param_groups],
            )
        )

    @property
    def selection(self):
        return self.model.base_model.selection

    @property
    def allocator(self):
        return allocator_of(self.model.get_base_model())

    def counted(self, kind):
        with flop_counter() as counter:
            self.model(**batch(kind))["loss"].backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_rank": "also", "r": 2},
        {"low_rank": "only", "r": 2},
        {"importance_batches": 2},
        {"probe_batch_size": 2},
        {"rho": 1.0},
    ],
    ids=str,
)
def test_what_is_always_trained_is_waited_for(options):
    run = Run(**options)
    run.step("text")
    before = run.applied()
    with pytest.warns(UserWarning, match="merger.bias, merger.weight"):
        for _ in range(3):
            run.step("text")
            assert run.applied() == before and run.selection is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("text", "image"):
            run.step(kind)
    if run.selection is None:  # low-rank forms are compared on two batches
        run.step("image")
    assert {"merger.weight", "merger.bias"} <= run.selection.tensors and run.selection.ratio <= 1
    assert not run.model.peft_config["default"].provisional


def test_what_never_comes_is_not_waited_for_without_end():
    run = Run()
    for _ in range(1 + PATIENCE):
        assert run.selection is None
        run.step("text")
    assert run.selection is not None and run.selection.ratio <= 0.8
    assert run.counted("text") == run.allocator.graph.flops(run.selection.candidates)
    # It is trained all the same.
    assert run.model.base_model.model.merger.modules_to_save["default"].weight.requires_grad
    before = run.model.base_model.model.merger.modules_to_save["default"].weight.clone()
    run.step("image")
    assert not torch.equal(run.model.base_model.model.merger.modules_to_save["default"].weight, before)


def test_the_next_probe_does_not_wait_again_for_what_never_came():
    run = Run(reselect=3)
    for _ in range(1 + PATIENCE):
        run.step("text")
    first = run.allocator.graph
    for _ in range(3):
        run.step("text")
    assert run.allocator.graph is not first


@pytest.mark.parametrize("target_modules", ["vision.*", ["vision.0", "vision.2"]])
def test_a_loss_that_reaches_no_candidate_is_waited_for(target_modules):
    run = Run(target_modules=target_modules, modules_to_save=None, rho=0.9)
    run.step("image")
    before = run.applied()
    with pytest.warns(UserWarning, match="no candidate"):
        for _ in range(PATIENCE + 3):
            run.step("text")
            assert run.applied() == before and run.selection is None
    run.step("image")
    assert run.selection is not None and run.selection.ratio <= 0.9


def test_what_an_earlier_probe_saw_is_waited_for():
    run = Run(modules_to_save=None, rho=1.0, reselect=2)
    for _ in range(2):
        run.step("image")
    assert "vision.0.weight" in run.selection.tensors
    graph, before = run.allocator.graph, run.applied()
    with pytest.warns(UserWarning, match="vision"):
        for _ in range(3):
            run.step("text")
    assert run.allocator.graph is graph and run.applied() == before
    run.step("image")
    assert run.allocator.graph is not graph and "vision.0.weight" in run.selection.tensors


def test_a_plan_over_batches_of_both_kinds_is_their_mean():
    run = Run()
    for kind in ("text", "text", "image"):
        run.step(kind)
    counted = run.counted("text") + run.counted("image")
    assert 2 * run.allocator.graph.flops(run.selection.candidates) == counted


def test_a_resumed_run_waits_as_the_whole_one():
    whole = Run()
    for _ in range(4):
        whole.step("text")
    state = json.loads(json.dumps(whole.allocator.state_dict()))
    resumed = Run()
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.allocator.resume(state, resumed.optimizer)
    resumed.steps = whole.steps
    for run in (whole, resumed):
        for _ in range(PATIENCE - 4):
            run.step("text")
            assert run.selection is None
        run.step("text")
    assert whole.selection == resumed.selection is not None
    assert whole.allocator.graph.flops(whole.selection.tensors) == resumed.allocator.graph.flops(
        whole.selection.tensors
    )


def of_rank(rank, folder, kinds):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    run = Run()
    found = []
    for step in range(len(kinds[0])):
        run.step(kinds[rank][step])
        found.append(run.selection)
    torch.save([selection and sorted(selection.tensors) for selection in found], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", [["text", "text", "text", "image"], ["image"] * 4])
def test_ranks_wait_together(first, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(of_rank, (str(tmp_path), [first, ["text"] * 4]), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    waits = first.index("image")
    assert [selection is None for selection in found[0]] == [step < max(1, waits) for step in range(4)]
