"""A probe leaves nothing behind, whatever happens between its forward pass and its backward pass."""

import copy
import gc

import pytest
import torch
from helpers.models import make_batch, make_model
from peft import get_peft_model

from peft_greentrainer import GreenTrainerConfig, profile
from peft_greentrainer.training.allocator import allocator_of


BACKWARD, GRAD = torch.autograd.backward, torch.autograd.grad


class Run:
    """A wrapped model in a plain loop whose next step is a probe."""

    def __init__(self, kind="llama", base=None, **options):
        self.kind = kind
        self.model = get_peft_model(base or make_model(kind), GreenTrainerConfig(**{"rho": 0.7, **options}))
        self.trained = self.trainable()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.step = 0
        self.update()

    def trainable(self):
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self):
        return self.model(**make_batch(self.kind, seed=self.step)).loss

    def update(self):
        self.optimizer.step()
        self.model.base_model.update_and_allocate(self.step, self.optimizer)
        self.optimizer.zero_grad()
        self.step += 1

    def train(self, steps):
        for _ in range(steps):
            self.loss().backward()
            self.update()

    @property
    def selection(self):
        return self.model.base_model.selection


def expected():
    """The selection and the graph of an undisturbed run."""
    run = Run()
    run.train(1)
    return run.selection, allocator_of(run.model.get_base_model()).graph


def assert_as_expected(run):
    selection, graph = expected()
    assert run.selection == selection
    found = allocator_of(run.model.get_base_model()).graph
    assert (found.forward_flops, found.full_flops) == (graph.forward_flops, graph.full_flops)
    assert torch.autograd.backward is BACKWARD and torch.autograd.grad is GRAD


def test_a_forward_pass_without_a_backward_pass_does_not_count():
    run = Run()
    for _ in range(3):
        run.loss().item()
        gc.collect()
        assert run.trainable() == run.trained and torch.autograd.backward is BACKWARD
    run.train(1)
    assert_as_expected(run)


def test_a_skipped_batch_does_not_count():
    run = Run()
    for _ in range(3):
        loss = run.loss()
    loss.backward()
    run.update()
    del loss
    assert_as_expected(run)


def test_two_forward_passes_before_one_backward_pass_both_count():
    run = Run()
    (run.loss() + run.loss()).backward()
    run.update()
    _, graph = expected()
    assert allocator_of(run.model.get_base_model()).graph.full_flops == 2 * graph.full_flops


def test_a_probe_that_was_given_up_disturbs_no_other_model():
    given_up = Run()
    kept = given_up.loss()
    assert torch.autograd.backward is not BACKWARD
    run = Run()
    run.train(1)
    assert run.selection == expected()[0]
    del kept
    gc.collect()
    assert_as_expected(run)


def test_the_backward_pass_of_another_model_is_not_that_of_the_probe():
    run = Run()
    loss = run.loss()
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    loss.backward()
    run.update()
    assert_as_expected(run)


def test_a_backward_pass_that_fails_starts_the_probe_again():
    run = Run()
    loss = run.loss()
    weight = next(p for p in run.model.parameters() if p.requires_grad)

    def fail(grad):
        raise RuntimeError("out of memory")

    hook = weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    hook.remove()
    del loss
    gc.collect()
    assert run.trainable() == run.trained
    run.optimizer.zero_grad()
    run.train(1)
    assert_as_expected(run)


def test_two_models_in_one_backward_pass():
    runs = [Run(), Run("gpt2")]
    (runs[0].loss() + runs[1].loss()).backward()
    for run in runs:
        run.update()
        assert run.selection is not None
    assert torch.autograd.backward is BACKWARD and torch.autograd.grad is GRAD


def test_a_copy_of_a_model_that_waits_for_a_probe():
    run = Run()
    copied = copy.deepcopy(run.model)
    copied(**make_batch("llama")).loss.backward()
    run.train(1)
    assert run.selection == expected()[0]
    del copied
    gc.collect()
    assert_as_expected(run)


def test_reentrant_checkpointing_is_recorded_once():
    base = make_model("llama")
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    run = Run(base=base.train(), rho=0.9)
    run.train(1)
    graph = allocator_of(run.model.get_base_model()).graph
    run.loss().backward()
    assert 0.75 < graph.floor < run.selection.ratio <= 0.9


def test_a_step_that_the_probe_cannot_see_is_named():
    run = Run()
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    for parameter, grad in zip(parameters, torch.autograd.grad(run.loss(), parameters)):
        parameter.grad = grad
    with pytest.warns(UserWarning, match=r"no forward and backward pass of the model was seen.*loss.backward\(\)"):
        run.update()
    assert run.selection is None and run.trainable() == run.trained
    run.train(1)
    assert run.selection is not None


@pytest.mark.parametrize("how", ["unload", "another adapter"])
def test_another_training_on_the_same_base_is_selected_anew(how):
    run = Run(rho=0.5, reselect="once")
    run.train(1)
    assert run.selection.ratio <= 0.5
    if how == "unload":
        other = Run(base=run.model.unload(), rho=0.9, reselect="once")
    else:
        other = run
        run.model.add_adapter("other", GreenTrainerConfig(rho=0.9, reselect="once"))
        run.model.set_adapter("other")
        run.optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
        run.train(1)
    assert other.selection is None
    other.train(1)
    assert 0.6 < other.selection.ratio <= 0.9


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Stubborn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    def forward(self, x):
        return {"loss": NoGradient.apply(self.first(x), self.second.weight).square().sum()}


def test_a_tensor_that_gets_no_gradient_is_left_out():
    graph = profile(Stubborn(), {"x": torch.randn(2, 4)})
    assert graph.tensors == ("first.weight", "first.bias")
    model = get_peft_model(Stubborn(), GreenTrainerConfig(rho=0.9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model(x=torch.randn(2, 4))["loss"].backward()
        model.base_model.update_and_allocate(step, optimizer)
    assert "second.weight" not in model.base_model.selection.tensors
