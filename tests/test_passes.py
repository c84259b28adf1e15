"""Whatever passes a step consists of, a probe sees them: the next step costs what was planned, and gradients are those of
a step without a probe."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.allocation import allocator_of
from peft_greentrainer.formulas import flop_counter


class Net(nn.Module):
    """An embedding that is also read as a weight, a trunk of three blocks, and two heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.trunk = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
        self.first, self.second = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, ids):
        hidden = self.trunk(self.embed(ids))
        return self.first(hidden), self.second(hidden)

    def encode(self, ids):
        return self.trunk(self.embed(ids))

    def training_step(self, ids):
        return self.encode(ids).square().mean()

    def read_weights(self, ids):
        """No module of it is called with gradients that a hook would see."""
        hidden = torch.tanh(nn.functional.embedding(ids, self.embed.weight) @ self.trunk[0][0].weight.T)
        return (self.trunk[1:](hidden) @ self.embed.weight.T).square().mean()


def ids(seed, rows=6):
    return torch.randint(0, 20, (rows,), generator=torch.Generator().manual_seed(seed))


def contrastive(left, right):
    return nn.functional.cross_entropy(left @ right.T, torch.arange(len(left)))


def is_trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Each takes a step of a loop, backward passes included.


def two_backward_passes(model, seed):
    first, second = model(ids(seed))
    first.square().mean().backward(retain_graph=True)
    second.square().mean().backward()


def two_losses_on_two_batches(model, seed):
    model(ids(seed))[0].square().mean().backward()
    model(ids(seed + 9, rows=3))[1].square().mean().backward()


def sharpness_aware(model, seed):
    """Sharpness-aware minimization: the gradient at weights that the first gradient has moved."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sum(x.square().mean() for x in model(ids(seed))).backward()
    moves = [1e-3 * p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    with torch.no_grad():
        for p, move in zip(trained, moves):
            p.add_(move)
            p.grad = None
    sum(x.square().mean() for x in model(ids(seed))).backward()
    with torch.no_grad():
        for p, move in zip(trained, moves):
            p.sub_(move)


def three_micro_batches(model, seed):
    for part in range(3):
        sum(x.square().mean() for x in model(ids(seed + part, rows=2 + part))).backward()


def loss_with_products_in_the_loop(model, seed):
    first, second = model(ids(seed))
    contrastive(first @ torch.ones(4, 3), second).backward()


def another_method(model, seed):
    model.training_step(ids(seed)).backward()


def method_that_reads_weights(model, seed):
    model.read_weights(ids(seed)).backward()


def parts_of_the_model(model, seed):
    hidden = model.trunk(model.embed(ids(seed)))
    contrastive(model.first(hidden), (hidden @ torch.ones(16, 4)).tanh()).backward()


def nested_in_a_hook(model, seed):
    """Cached gradients, as in contrastive learning with batches that do not fit: each part runs twice."""
    parts = [ids(seed + part, rows=4) for part in range(2)]
    with torch.no_grad():
        states = [model.encode(part) for part in parts]
    states = [state.detach().requires_grad_() for state in states]
    inner = contrastive(*states)
    inner.backward()
    loss = inner.detach().requires_grad_()

    def run_again(grad):
        with torch.enable_grad():
            for part, state in zip(parts, states):
                (torch.dot(model.encode(part).flatten(), state.grad.flatten()) * grad).backward()

    loss.register_hook(run_again)
    loss.backward()


class InsideBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, model, batch):
        ctx.model, ctx.batch = model, batch
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            (ctx.model(ctx.batch)[0].square().mean() * grad).backward()
        return torch.zeros_like(grad), None, None


def nested_in_a_function(model, seed):
    InsideBackward.apply(torch.ones((), requires_grad=True), model, ids(seed)).backward()


class InsideForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            loss = (hidden @ weight).square().mean()
            (ctx.grad,) = torch.autograd.grad(loss, hidden)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.grad * grad, None


def loss_that_computes_its_gradient_in_its_forward_pass(model, seed):
    InsideForward.apply(model.encode(ids(seed)), torch.ones(16, 8)).backward()


STEPS = [
    two_backward_passes,
    two_losses_on_two_batches,
    sharpness_aware,
    three_micro_batches,
    loss_with_products_in_the_loop,
    another_method,
    method_that_reads_weights,
    parts_of_the_model,
    nested_in_a_hook,
    nested_in_a_function,
    loss_that_computes_its_gradient_in_its_forward_pass,
]


class Run:
    """A loop over steps, in an adapter whose next step is a probe."""

    def __init__(self, base=None, around=lambda model: model, **options):
        self.model = get_peft_model(base or Net(), GreenTrainerConfig(**{"rho": 0.7, "reselect": "once"} | options))
        self.called = around(self.model)
        self.optimizer = torch.optim.SGD([p for p in self.called.parameters() if p.requires_grad], lr=1e-3)
        self.update(0)

    def update(self, step):
        self.model.base_model.update_and_allocate(step, self.optimizer)
        self.optimizer.zero_grad()

    @property
    def allocator(self):
        return allocator_of(self.model.get_base_model())

    def check(self, step):
        """The step is probed, and another one like it costs what was planned and no more than rho of a full one."""
        plain, trained = copy.deepcopy(self.called), is_trained(self.called)
        step(plain, 1)
        step(self.called, 1)
        assert is_trained(self.called) == trained
        of_plain = dict(plain.named_parameters())
        for name, parameter in self.called.named_parameters():
            expected = of_plain[name].grad
            assert (parameter.grad is None) == (expected is None), name
            assert expected is None or torch.equal(parameter.grad, expected), name
        self.update(1)
        selection, graph = self.model.base_model.selection, self.allocator.graph
        assert selection is not None and selection.ratio <= 0.7
        with flop_counter() as counter:
            step(self.called, 1)
        assert counter.get_total_flops() == graph.flops(selection.candidates)

        # Full fine-tuning of the same, by a count too.
        full = copy.deepcopy(self.called)
        for module in full.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad_(True)
        full.zero_grad()
        for _, parameter in full.named_parameters():
            parameter.grad = None
        with flop_counter() as counter:
            step(full, 1)
        assert counter.get_total_flops() == graph.full_flops


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_costs_what_was_planned(step):
    Run().check(step)


@pytest.mark.parametrize("low_rank", [2, "only"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_with_low_rank_candidates_is_selected_for(step, low_rank):
    run = Run(low_rank=low_rank, r=2)
    for number in (1, 2):
        step(run.called, number)
        run.update(number)
    selection = run.model.base_model.selection
    with flop_counter() as counter:
        step(run.called, 1)
    graph = run.allocator.graph
    assert counter.get_total_flops() / graph.full_flops == pytest.approx(selection.ratio, rel=0.01)
