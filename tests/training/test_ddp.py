"""A selection gives DistributedDataParallel another reducer; all else of it stays as its user made it."""

import functools
import inspect

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.adapter.values import candidates, set_selection, set_values
from peft_greentrainer.training.parallel.ddp import rebuild_reducers


# Arguments that the tests cannot give another value than the default: the first two are for GPUs, the third does nothing.
WITHOUT_TEST = {"self", "module", "device_ids", "output_device", "check_reduction"}
TESTED_APART = {"mixed_precision"}
OPTIONS = {
    "dim": lambda model: {"dim": 1},
    "broadcast_buffers": lambda model: {"broadcast_buffers": False},
    "init_sync": lambda model: {"init_sync": False},
    "process_group": lambda model: {"process_group": dist.new_group()},
    "bucket_cap_mb": lambda model: {"bucket_cap_mb": 3},
    "find_unused_parameters": lambda model: {"find_unused_parameters": True},
    "gradient_as_bucket_view": lambda model: {"gradient_as_bucket_view": True},
    "static_graph": lambda model: {"static_graph": True},
    "delay_all_reduce_named_params": lambda model: delayed(model, "head."),
    "param_to_hook_all_reduce": lambda model: delayed(model, "head.weight"),
    "device_mesh": lambda model: {"device_mesh": dist.device_mesh.init_device_mesh("cpu", (1,))},
    "skip_all_reduce_unused_params": lambda model: {
        "skip_all_reduce_unused_params": True,
        "find_unused_parameters": True,
    },
    "bucket_cap_mb_list": lambda model: {"bucket_cap_mb_list": [1, 2]},
    "batched_grad_copy": lambda model: {"batched_grad_copy": True, "gradient_as_bucket_view": True},
    "forward_sync_buffers": lambda model: {"forward_sync_buffers": False},
}
ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters


@functools.cache
def expected():
    """What training gives without any wrapper."""
    model = Net()
    return train(model, model)


def is_expected(state):
    return all(torch.equal(value, expected()[name]) for name, value in state.items() if torch.is_tensor(value))


def delayed(model, prefix):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name.startswith(prefix)]
    return {"delay_all_reduce_named_params": named, "param_to_hook_all_reduce": model.head.weight}


class Branches(nn.Module):
    """Which of the two has the larger gradients depends on the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return self.norm(self.first(x[:, :4]) + self.second(x[:, 4:]))


class Net(nn.Module):
    """An adapted model and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = get_peft_model(Branches(), GreenTrainerConfig(rho=0.6, reselect=2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.base(x))


def train(model, wrapped, steps=5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trained = []
    for step in range(steps):
        rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        rows[:, 4 * (step // 2 % 2) :][:, :4] *= 0.1
        wrapped(rows).square().mean().backward()
        optimizer.step()
        model.base.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        trained.append(frozenset(name for name, p in model.named_parameters() if p.requires_grad))
    assert len(set(trained)) > 2
    return model.state_dict()


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def reducers(monkeypatch):
    """The arguments of every reducer, but for its parameters and what depends on them."""
    made = []
    of_torch = dist.Reducer

    def make(*args):
        by_parameters = (0, 1, 2, 4, 8)  # the buckets, their sizes, sparse gradients, and names
        made.append([argument for i, argument in enumerate(args) if i not in by_parameters])
        return of_torch(*args)

    monkeypatch.setattr(dist, "Reducer", make)
    return made


def settings(ddp):
    """The attributes of a wrapper, but for those that follow what is trained, or the steps."""
    of_training = {"reducer", "logger", "_module_parameters", "modules_buffers", "named_module_buffers", "_comm_hooks"}
    of_steps = {"_lazy_init_ran", "_has_rebuilt_buckets", "_static_graph_delay_allreduce_enqueued"}
    return {name: value for name, value in vars(ddp).items() if name not in of_training | of_steps}


def test_every_argument_is_tested():
    assert ARGUMENTS.keys() <= WITHOUT_TEST | TESTED_APART | OPTIONS.keys()


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("option", [option for option in OPTIONS if option in ARGUMENTS])
def test_a_selection_keeps_the_setting(option, reducers):
    model = Net()
    ddp = DistributedDataParallel(model, **OPTIONS[option](model))
    before = settings(ddp)
    hooks = list(ddp._comm_hooks)
    assert is_expected(train(model, ddp))
    assert len(reducers) > 2 and all(made == reducers[0] for made in reducers)
    assert settings(ddp) == before and ddp._comm_hooks == hooks


def test_a_selection_keeps_mixed_precision(reducers):
    """Without a step, for which it asks for a GPU."""
    model = Net()
    ddp = DistributedDataParallel(model, mixed_precision=_MixedPrecision(torch.bfloat16))
    before, hooks = settings(ddp), list(ddp._comm_hooks)
    pre_hooks = {name: len(module._forward_pre_hooks) for name, module in ddp.named_modules()}
    base = model.base.get_base_model()
    set_values(base, "default", candidates(base, base.peft_config["default"]))
    set_selection(base, "default", ["first.0.weight"])
    rebuild_reducers(base)
    assert reducers[0] == reducers[1]
    assert settings(ddp) == before and ddp._comm_hooks == hooks and ddp.mixed_precision
    assert {name: len(module._forward_pre_hooks) for name, module in ddp.named_modules()} == pre_hooks
    assert all(p._mp_param.dtype == torch.bfloat16 for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [p._idx for p in trained] == list(range(3))


def test_hooks_stay():
    model = Net()
    ddp = DistributedDataParallel(model)
    calls = {"gradients": 0, "buffers": 0, "forward": 0}

    def count(what, *_):
        calls[what] += 1

    def reduce(state, bucket):
        count(state)
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook("gradients", reduce)
    ddp._register_buffer_comm_hook("buffers", count)
    ddp.register_forward_hook(lambda *_: count("forward"))
    train(model, ddp)
    assert calls == {"gradients": 5, "buffers": 5, "forward": 5}


def test_a_built_in_hook_stays():
    model = Net()
    ddp = DistributedDataParallel(model)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    train(model, ddp)
    assert ddp._get_ddp_logging_data()["comm_hook"] == "BuiltinCommHookType.FP16_COMPRESS"
    ddp(torch.ones(2, 8)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.equal(gradient, gradient.half().float()) for gradient in gradients)


@torch._dynamo.config.patch(optimize_ddp="python_reducer")
@torch._inductor.config.patch(_fuse_ddp_communication=False)
def test_the_python_reducer_has_one_hook_for_each_trained_tensor():
    model = Net()
    assert is_expected(train(model, DistributedDataParallel(model)))
    for p in model.parameters():
        assert len(p._post_accumulate_grad_hooks or ()) == p.requires_grad


def test_a_wrapper_that_failed_while_it_was_made_has_no_part():
    model = Net()
    with pytest.raises(ValueError) as error:
        DistributedDataParallel(model, bucket_cap_mb="much")
    assert is_expected(train(model, DistributedDataParallel(model))) and error.tb


def test_values_whose_reduction_is_delayed_are_refused():
    model = Net()
    ddp = DistributedDataParallel(model, **delayed(model, "base."))
    with pytest.raises(ValueError, match="delay_all_reduce_named_params names values"):
        train(model, ddp)
