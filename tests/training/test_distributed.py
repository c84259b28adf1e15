"""Two processes on the CPU: the same selection on every rank, gradients synchronized, the run of one process."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ranks
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.tensors.names import is_low_rank


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    + ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
}


def run(launcher, what, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], ranks.__file__, what, str(folder)],
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and whoever it has started
        except ProcessLookupError:
            pass
    assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check(of_ranks, expected):
    for found in of_ranks:
        assert found["selected"] == expected["selected"]
        assert found["values"].keys() == expected["values"].keys()
        for name, value in expected["values"].items():
            assert torch.equal(found["values"][name], of_ranks[0]["values"][name]), name
            torch.testing.assert_close(found["values"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("what", ["loop", "container"])
def test_a_plain_loop_under_ddp_is_that_of_one_process_with_the_doubled_batch(what, tmp_path):
    of_ranks = run("torchrun", what, tmp_path)
    model = ranks.Headed() if what == "container" else ranks.peft_model()
    gradients = ranks.loop(model, model, 0, 1)
    check(of_ranks, ranks.result(model))
    assert len({frozenset(of_step) for of_step in gradients}) > 1  # the selection did change
    trained = [sum(gradient.numel() for gradient in of_step.values()) for of_step in gradients]
    assert of_ranks[0]["reduced"] == of_ranks[1]["reduced"] == trained  # and nothing that is frozen
    for first, second, expected in zip(*(found["gradients"] for found in of_ranks), gradients):
        assert first.keys() == second.keys() == expected.keys()
        for name in expected:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], expected[name], rtol=1e-3, atol=1e-5)
    for found in of_ranks:  # what all ranks have is not sent again
        assert found["sent at wrapping"] >= sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert found["sent at selections"] == 0


def test_low_rank_candidates_under_ddp_are_the_same_on_every_rank(tmp_path):
    first, second = run("torchrun", "low-rank", tmp_path)
    assert first["selected"] == second["selected"] and any(map(is_low_rank, first["selected"]))
    assert first["values"].keys() == second["values"].keys()
    assert all(torch.equal(value, second["values"][name]) for name, value in first["values"].items())
    assert first["reduced"] == [sum(g.numel() for g in of_step.values()) for of_step in first["gradients"]]
    for of_steps in zip(first["gradients"], second["gradients"]):
        assert all(torch.equal(gradient, of_steps[1][name]) for name, gradient in of_steps[0].items())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_under_ddp_is_that_of_one_process_with_the_doubled_batch(launcher, tmp_path):
    of_ranks = run(launcher, "trainer", tmp_path)
    model = ranks.peft_model()
    ranks.train(model, tmp_path / "one", 2 * ranks.ROWS)
    check(of_ranks, ranks.result(model))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_states_under_fsdp1_are_saved_and_loaded(one_process):
    """peft's own test of this: https://github.com/huggingface/peft, tests/test_custom_models.py"""
    base = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    config = {"rho": 1.0, "init_weights": False}
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(**config))
    expected = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    state = get_peft_model_state_dict(model, state_dict=wrapped.state_dict())
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    other = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(**config))
    set_peft_model_state_dict(other, state)
    found = get_peft_model_state_dict(other)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class DeepSpeedOptimizerWrapper(torch.optim.SGD):
    """By its name the optimizer that accelerate gives with DeepSpeed."""


def test_deepspeed_is_refused_at_the_start(one_process):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), GreenTrainerConfig(rho=1.0))
    optimizer = DeepSpeedOptimizerWrapper([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="Use DistributedDataParallel"):
        model.base_model.update_and_allocate(0, optimizer)


def test_sharded_parameters_are_refused_at_the_start(one_process):
    for shard in (
        lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
        fully_shard,
    ):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), GreenTrainerConfig(rho=1.0))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapper = shard(model)
        with pytest.raises(ValueError, match="Use DistributedDataParallel"):
            wrapper.base_model.update_and_allocate(0, optimizer)
