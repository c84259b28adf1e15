"""A tensor that a module holds itself and shares with a child is one tensor, in every use."""

import copy
import pickle

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer, export_tensors, flop_counter
from peft_greentrainer.adapter.values import candidates, layers


class Tied(nn.Module):
    """The root holds the embedding's weight and uses it for its logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.inner = nn.Linear(4, 4)
        self.output = self.embedding.weight

    def forward(self, ids):
        logits = self.inner(self.embedding(ids)).tanh() @ self.output.T
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), "logits": logits}


class Deep(nn.Module):
    """Two modules inside hold it, one of them under two names; a method that is not forward reads it."""

    def __init__(self):
        super().__init__()
        self.tied = Tied()
        self.other = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        self.other.register_parameter("table", self.tied.embedding.weight)
        self.other.register_parameter("again", self.tied.embedding.weight)

    def penalty(self):
        return self.other.table.square().mean() + self.other.again.abs().mean()

    def forward(self, ids):
        output = self.tied(ids)
        output["loss"] = output["loss"] + self.penalty() + self.other["norm"](self.tied.embedding(ids)).mean()
        return output


class Listed(nn.Module):
    """A list of parameters, which is no leaf to wrap, shares a linear weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8, bias=False)
        self.embedding = nn.Embedding(8, 4)
        self.shelf = nn.ParameterList([self.linear.weight, nn.Parameter(torch.randn(8, 4))])

    def forward(self, ids):
        hidden = self.embedding(ids) + self.shelf[0][ids] + self.shelf[1][ids]
        logits = self.linear(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), "logits": logits}


class Named(nn.Module):
    """A leaf that cannot be wrapped, for the name of its method, shares the weight of one that can."""

    class Leaf(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def merge(self, hidden):
            return hidden @ self.weight.T

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.leaf = self.Leaf(self.embedding.weight)

    def forward(self, ids):
        logits = self.leaf.merge(self.embedding(ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), "logits": logits}


class Registered(Tied):
    """A class that wants to be told something of its subclasses."""

    def __init_subclass__(cls, name, **kwargs):
        super().__init_subclass__(**kwargs)


MAKE = [Tied, Deep, Listed, Named, Registered]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


@pytest.fixture(params=MAKE)
def base(request):
    torch.manual_seed(0)
    return request.param()


def shared(model):
    """The names of the tensors that are held more than once."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def logits(model):
    with torch.no_grad():
        return model(IDS)["logits"]


def test_the_gradient_is_that_of_all_uses(base):
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    assert torch.equal(logits(model), logits(base))
    for each in (base, model):
        each(IDS)["loss"].backward()
    gradients = {name: p.grad for name, p in base.named_parameters()}
    wrappers = layers(model)
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert any(name in found for names in shared(base) for name in names)
    for name in found:
        key, _, tensor = name.rpartition(".")
        expected = gradients.get(name)
        if expected is None:  # named_parameters has the first of its names
            expected = next(gradients[other] for names in shared(base) for other in names if other in gradients)
        assert torch.equal(wrappers[key].greentrainer_values["default"][tensor].grad, expected), name


def test_trained_merged_saved_and_unloaded_it_is_still_one_tensor(base, tmp_path):
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    plain = copy.deepcopy(base)
    for each in (plain, model):  # the same steps on the plain model
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        if each is plain:
            trained = {n for names in shared(plain) for n in names}
            trained |= set(candidates(model.get_base_model(), model.peft_config["default"]))
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(name in trained)
        for _ in range(3):
            each(IDS)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    after = logits(model)
    assert torch.equal(after, logits(plain)) and not torch.equal(after, logits(base))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.merge_adapter()
    assert torch.equal(logits(model), after)
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
    patched = copy.deepcopy(base)
    patched.load_state_dict(export_tensors(model), strict=False)
    assert torch.equal(logits(patched), after)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same), after)
        values = [p for p in same.parameters() if p.requires_grad]
        values[0].data += 1
        assert torch.equal(logits(model), after)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), after)
    assert shared(merged) == shared(base)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


def test_planned_is_counted(base):
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0 if isinstance(base, Named) else 0.9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        model(IDS)["loss"].backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    with flop_counter() as counter:
        model(IDS)["loss"].backward()
    with flop_counter() as full:
        base(IDS)["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(model.base_model.selection.ratio * full.get_total_flops())


def test_a_second_adapter_reads_its_own(base):
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    first = logits(model)
    model.add_adapter("second", GreenTrainerConfig(rho=1.0, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    model.merge_adapter(["second"])
    assert torch.equal(logits(model), second)


def test_tied_again_it_stays_tied():
    # As `tie_weights` of transformers does it, with the names of a masked language model.
    base = make_model("bert")
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0, init_weights=False)).eval()
    head = base.cls.predictions
    with torch.no_grad():
        before = model(**make_batch("bert")).logits
        head.decoder.bias = head.bias
        head.decoder.weight = base.bert.embeddings.word_embeddings.weight
        head.bias = head.decoder.bias
        assert torch.equal(model(**make_batch("bert")).logits, before)
    assert head.decoder.base_layer.bias is not head.bias is head.decoder.bias


def test_bfloat16_bases_read_the_value_in_their_type():
    torch.manual_seed(0)
    base = Tied().bfloat16()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    assert model.get_base_model().output.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(base))
    model(IDS)["loss"].backward()
    value = model.get_base_model().embedding.greentrainer_values["default"]["weight"]
    base(IDS)["loss"].backward()
    torch.testing.assert_close(value.grad, base.embedding.weight.grad.float(), rtol=0.05, atol=1e-3)


def test_a_module_that_shares_keeps_its_class():
    model = get_peft_model(Deep(), GreenTrainerConfig()).get_base_model()
    assert isinstance(model.tied, Tied) and isinstance(model.other, nn.ModuleDict)
    assert not isinstance(model.tied, GreenTrainerLayer) and type(model.tied).__name__ == "Tied"
    compiled = torch.compile(model.eval(), backend="eager")
    torch.testing.assert_close(compiled(IDS)["logits"], logits(model))


def test_a_tied_tensor_is_one_value_and_one_entry(tmp_path):
    model = get_peft_model(make_model("llama-tied"), GreenTrainerConfig())
    train_a_little(model, "llama-tied", ["model.embed_tokens.weight"])
    base = model.get_base_model()
    value = base.model.embed_tokens.greentrainer_values["default"]["weight"]
    assert base.lm_head.weight is value and base.model.embed_tokens.weight is value
    model.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.greentrainer_values.weight"
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [key]
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, value)


@pytest.mark.parametrize("kind", ["llama-tied", "t5", "bart"])
def test_tensors_are_tied_again_without_harm(kind):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=1.0, init_weights=False))
    before = outputs(model, kind)
    model.get_base_model().tie_weights()
    assert torch.equal(outputs(model, kind), before)


@pytest.mark.parametrize("kind", ["llama-tied", "t5", "bart"])
def test_one_use_of_a_tied_tensor_is_a_module_to_save(kind, tmp_path):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=0.9, modules_to_save=["lm_head"]))
    Loop(model, kind).run(3)
    assert "lm_head.weight" in model.base_model.selection.tensors
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(kind), tmp_path)
    assert torch.equal(outputs(loaded, kind), outputs(model, kind))
