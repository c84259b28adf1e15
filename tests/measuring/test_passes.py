"""Whatever passes a step consists of, a probe sees them: the next step costs what was planned, and gradients are those of
a step without a probe."""

import copy
import dataclasses
import random
import types

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_greentrainer import GreenTrainerConfig, flop_counter, profile
from peft_greentrainer.training.allocator import allocator_of


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


def backward_for_what_is_trained(model, seed):
    """As some do who take no gradient of anything else."""
    model.training_step(ids(seed)).backward(inputs=[p for p in model.parameters() if p.requires_grad])


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
    backward_for_what_is_trained,
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


@pytest.mark.parametrize("low_rank", ["also", "only"])
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


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_is_broken_off_leaves_nothing_behind(interrupt):
    class Broken(Net):
        breaks = False

        def encode(self, ids):
            hidden = self.trunk(self.embed(ids))
            if self.breaks:
                raise interrupt()
            return hidden

    run = Run(Broken())
    names = is_trained(run.model)
    run.model.get_base_model().breaks = True
    with pytest.raises(interrupt):
        another_method(run.called, 1)
    run.model.get_base_model().breaks = False
    run.update(1)
    assert is_trained(run.model) == names
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    run.check(another_method)


# What a model returns, and who calls it


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    states: list


class Slotted:
    __slots__ = ("loss",)

    def __init__(self, loss):
        self.loss = loss


OUTPUTS = {
    "dataclass": lambda loss: Output(loss, [loss.detach()]),
    "namespace": lambda loss: types.SimpleNamespace(loss=loss),
    "nested mapping": lambda loss: {"task": {"loss": loss}, "logs": {"lr": 0.1}},
    "namespace in a list": lambda loss: [types.SimpleNamespace(loss=loss), None],
    "slots": Slotted,
    "scalar": lambda loss: loss,
    "function": lambda loss: lambda: loss,
}


def loss_of_any(output):
    while not isinstance(output, torch.Tensor):
        if callable(output):
            output = output()
        elif isinstance(output, list):
            output = output[0]
        elif isinstance(output, dict):
            output = output.get("loss", output.get("task"))
        else:
            output = output.loss
    return output


class Returning(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, ids):
        return OUTPUTS[self.kind](self.training_step(ids))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_any_output_counts(kind):
    def step(model, seed):
        loss_of_any(model(ids(seed))).backward()

    Run(Returning(kind)).check(step)


@pytest.mark.parametrize("kind", [kind for kind in OUTPUTS if kind != "function"])
def test_the_loss_is_found_in_any_output(kind):
    """In a pass of its own, on some rows."""
    run = Run(Returning(kind), probe_batch_size=2)
    loss_of_any(run.called(ids(1))).backward()
    run.update(1)
    assert run.model.base_model.selection is not None
    with flop_counter() as counter:
        loss_of_any(run.called(ids(1, rows=2))).backward()
    assert counter.get_total_flops() == run.allocator.graph.flops(run.model.base_model.selection.tensors)


class Classifier(nn.Module):
    """Holds an adapted model and a head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 5)

    def forward(self, ids):
        return {"loss": self.head(self.encoder.encode(ids)).square().mean()}

    def training_step(self, ids):
        return self.head(self.encoder.encode(ids)).square().mean()


def test_a_container_of_the_model_is_part_of_the_step():
    def step(model, seed):
        model(ids(seed))["loss"].backward()

    Run(around=Classifier).check(step)


def test_a_method_of_a_container_is_part_of_the_step():
    def step(model, seed):
        model.training_step(ids(seed)).backward()

    Run(around=Classifier).check(step)


def test_a_head_in_the_loop_is_part_of_the_step():
    head = nn.Linear(16, 5)

    def step(model, seed):
        head(model.encode(ids(seed))).square().mean().backward()

    Run().check(step)


def test_an_input_that_requires_grad_is_part_of_the_step():
    class Continuous(Net):
        def forward(self, x):
            return self.first(self.trunk(x)).square().mean()

    def step(model, seed):
        x = torch.ones(6, 16, requires_grad=True)
        model(x).backward()

    Run(Continuous()).check(step)


class Checkpointed(Net):
    def encode(self, ids):
        hidden = self.embed(ids)
        for block in self.trunk:
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
        return hidden


@pytest.mark.parametrize("step", [nested_in_a_hook, nested_in_a_function, another_method, two_losses_on_two_batches])
def test_a_step_with_checkpointing_costs_what_was_planned(step):
    if step is two_losses_on_two_batches:
        Run(Checkpointed()).check(
            lambda model, seed: [model.training_step(ids(seed + i)).backward() for i in range(2)]
        )
    else:
        Run(Checkpointed()).check(step)


# What happens in between


def only_trained_requires_grad(step):
    """The step, with what a loop may do in between."""

    def checked(model, seed):
        names = is_trained(model)
        losses = step(model, seed)
        for loss in losses:
            assert is_trained(model) == names
            penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
            (loss + 1e-3 * penalty).backward(retain_graph=True)
            assert is_trained(model) == names
            reached = [p.grad.norm() for p in model.parameters() if p.requires_grad and p.grad is not None]
            assert len(reached) == len(names)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    return checked


@pytest.mark.parametrize("low_rank", [False, "also"])
def test_outside_of_passes_only_what_is_trained_requires_grad(low_rank):
    def step(model, seed):
        yield sum(x.square().mean() for x in model(ids(seed)))
        yield model.training_step(ids(seed))
        hidden = model.trunk(model.embed(ids(seed)))
        yield model.first(hidden).square().mean()

    run = Run(low_rank=low_rank, r=2)
    plain = copy.deepcopy(run.called)
    for model in (plain, run.called):
        only_trained_requires_grad(step)(model, 1)
    for (name, p), (_, q) in zip(plain.named_parameters(), run.called.named_parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (torch.equal(p.grad, q.grad) and p.requires_grad), name
    run.update(1)
    assert run.model.base_model.selection is not None


def test_modes_of_the_user_stay_as_they_are():
    run = Run()
    counts = []
    for called in (copy.deepcopy(run.called), run.called):
        before, after = flop_counter(), flop_counter()
        with before:
            loss = called.training_step(ids(1))
        with after:
            (loss @ loss.detach() if loss.dim() else loss * 2).backward()
        with torch.device("cpu"), flop_counter() as whole:
            loss = called.training_step(ids(1))
        loss.backward()
        counts.append((before.get_total_flops(), whole.get_total_flops()))
        assert after.get_total_flops() > 0
    assert counts[0] == counts[1]
    run.update(1)
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0


def test_a_mode_that_is_left_in_the_middle_of_a_method():
    class Counting(Net):
        def training_step(self, ids):
            with flop_counter() as counter, torch.device("cpu"):
                hidden = self.encode(ids)
            assert counter.get_total_flops() == 3 * 2 * len(ids) * 16 * 16
            return self.first(hidden).square().mean()

    Run(Counting()).check(another_method)


def expected_graph(step=another_method):
    run = Run()
    step(run.called, 1)
    run.update(1)
    return run.allocator.graph


@pytest.mark.parametrize(
    "how", ["evaluation", "no gradients", "in training mode", "with gradients", "generation", "another"]
)
def test_what_no_backward_pass_comes_from_does_not_count(how):
    class Generating(Net):
        @torch.no_grad()
        def generate(self, ids):
            for _ in range(3):
                ids = (self.encode(ids) @ self.embed.weight.T).argmax(-1)
            return ids

    run = Run(Generating())
    batch = ids(1)
    if how == "evaluation":
        run.called.eval()
        with torch.no_grad():
            run.called.training_step(batch)
        another_method(run.called.train(), 1)
    elif how == "no gradients":
        with torch.inference_mode():
            run.called(batch)
        another_method(run.called, 1)
    elif how == "in training mode":
        with torch.no_grad():
            print(run.called.training_step(batch).item(), run.called(batch))
        another_method(run.called, 1)
    elif how == "with gradients":
        run.called(batch)
        another_method(run.called, 1)
        run.kept = run.called(batch)
    elif how == "generation":
        run.called.training_step(run.called.generate(batch)).backward()
    else:
        loss = run.called.training_step(batch)
        other = nn.Linear(8, 8)
        other(other(torch.ones(3, 8))).sum().backward()
        loss.backward()
    run.update(1)
    graph, expected = run.allocator.graph, expected_graph()
    assert (graph.forward_flops, graph.full_flops) == (expected.forward_flops, expected.full_flops)
    assert is_trained(run.model) and torch._C._len_torch_dispatch_stack() == 0


def test_a_reference_without_gradients_that_the_loss_is_compared_with_counts():
    def step(model, seed):
        with torch.no_grad():
            reference = model.encode(ids(seed))
        (model.encode(ids(seed)) - reference * 0.5).square().mean().backward()

    Run().check(step)


def test_a_gradient_penalty_costs_what_was_planned():
    def step(model, seed):
        x = torch.ones(6, 16, requires_grad=True) * 2  # of a leaf the counter can make no sense
        out = model.first(model.trunk(x)).square().mean()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        (out + grad.square().sum()).backward()

    Run().check(step)


def test_a_profile_with_a_gradient_penalty_is_exact():
    class Penalized(Net):
        def forward(self, x):
            x = x * 2
            out = self.first(self.trunk(x)).square().mean()
            (grad,) = torch.autograd.grad(out, x, create_graph=True)
            return {"loss": out + grad.square().sum()}

    model, x = Penalized(), torch.ones(6, 16, requires_grad=True)
    graph = profile(model, {"x": x})
    choose = random.Random(0)
    for _ in range(6):
        names = choose.sample(graph.tensors, choose.randint(1, len(graph.tensors)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        with flop_counter() as counter:
            model(x)["loss"].backward()
        assert counter.get_total_flops() == graph.flops(names)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_that_waits_for_a_probe_has_plain_methods(how, tmp_path):
    run = Run()
    if how == "deepcopy":
        copied = copy.deepcopy(run.model)
    else:
        torch.save(run.model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    names = is_trained(copied)
    copied.training_step(ids(1)).backward()
    assert is_trained(copied) == names and run.allocator._probe.passes == 0
    assert {name for name, p in copied.named_parameters() if p.grad is not None} <= names
    another_method(run.called, 1)
    run.update(1)
    assert run.allocator.graph.full_flops == expected_graph().full_flops
    assert "training_step" not in vars(run.model.get_base_model())
    copied.training_step(ids(1)).backward()


def test_a_loss_that_is_compiled_in_the_loop():
    loss_of = torch.compile(lambda x: (x @ x.T).square().mean(), backend="aot_eager")

    def step(model, seed):
        loss_of(model.encode(ids(seed))).backward()

    run = Run()
    step(run.called, 1)
    run.update(1)
    assert run.model.base_model.selection is not None
    step(run.called, 1)


def test_a_message_tells_of_a_step_without_a_pass():
    run = Run()
    with torch.no_grad():
        run.called(ids(1))
    with pytest.warns(UserWarning, match=r"no forward and backward pass of the model was seen.*loss.backward\(\)"):
        run.update(1)
    another_method(run.called, 2)
    run.update(2)
    assert run.model.base_model.selection is not None
