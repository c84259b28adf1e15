"""One matrix: every kind of model goes through every promise of a peft adapter."""

import copy
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import peft_greentrainer
from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer, profile
from peft_greentrainer.adapter.values import candidates, layers, set_selection, set_values
from peft_greentrainer.measuring.formulas import flop_counter


KINDS = [
    "llama",
    "llama-tied",
    "gpt2",
    "opt",
    "bloom",
    "t5",
    "bert",
    "mixture",
    "mamba",
    "mamba2",
    "qwen3-next",
    "convnet",
]


def owners(model):
    """The tensors that a wrapper of their own module can hold: modules with parameters whose children have none."""
    seen = {}
    for key, module in model.named_modules():
        nested = any(True for child in module.children() for _ in child.parameters())
        for name, parameter in module.named_parameters(recurse=False):
            if key and not nested:
                seen.setdefault(id(parameter), f"{key}.{name}")
    return sorted(seen.values())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def trained(kind):
    """A base model, and a copy of it with an adapter whose tensors have moved."""
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=0.6))
    train_a_little(model, kind)
    return base, model


def test_every_module_that_owns_parameters_has_candidates(kind):
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig())
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert sorted(found) == owners(base)


def test_an_untrained_adapter_changes_nothing(kind):
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig())
    assert torch.equal(outputs(model, kind), outputs(base, kind))
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


def test_every_gradient_is_that_of_full_fine_tuning(kind):
    # Whatever way a model reads its tensors: as a child's weight (Mamba, Qwen3-Next), from a tied module, by a method.
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    for each in (base, model):
        output = each.eval()(**make_batch(kind))
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    expected = {name: p.grad for name, p in base.named_parameters(remove_duplicate=False)}
    found = layers(model)
    tensors = candidates(model.get_base_model(), model.peft_config["default"])
    for name in tensors:
        key, _, tensor = name.rpartition(".")
        assert torch.equal(found[key].greentrainer_values["default"][tensor].grad, expected[name]), name


def test_save_load_and_merge_are_bit_identical(kind, trained, tmp_path):
    base, model = trained
    after = outputs(model, kind)
    assert not torch.equal(after, outputs(base, kind))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of peft's own use of transformers
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded, kind), after)
    assert not any(p.requires_grad for p in loaded.parameters())

    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    assert torch.equal(outputs(merged, kind), after)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not any(isinstance(module, GreenTrainerLayer) for module in merged.modules())
    tied = [
        {n for n, p in m.named_parameters(remove_duplicate=False)} - dict(m.named_parameters()).keys()
        for m in (merged, base)
    ]
    assert tied[0] == tied[1]


def test_the_file_holds_the_changed_tensors_only(kind, trained, tmp_path):
    base, model = trained
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    changed = {
        f"{key}.{name}"
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, GreenTrainerLayer)
        for name in layer.greentrainer_values["default"]
        if not torch.equal(layer.effective_tensor(name), layer.base_tensor(name))
    }
    names = {k.removeprefix("base_model.model.").replace("greentrainer_values.", "") for k in file}
    unmoved = names - changed  # a key's bias has no gradient in a softmax, say
    assert changed <= names and len(unmoved) <= len(names) // 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "GREENTRAINER"
    assert set(config["tensors"]) == set(config["selected"]) == names
    base_tensors = dict(base.named_parameters(remove_duplicate=False))
    assert all(config["tensors"][name]["shape"] == list(base_tensors[name].shape) for name in names)


def test_disable_adapter_and_unload_give_the_base(kind, trained):
    base, model = trained
    before, after = outputs(base, kind), outputs(model, kind)
    flags = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(outputs(model, kind), before)
        with model.disable_adapter():
            assert torch.equal(outputs(model, kind), before)
    assert torch.equal(outputs(model, kind), after)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(outputs(model.unload(), kind), before)


def test_merge_and_unmerge_restore_the_base_bit_for_bit(kind, trained):
    base, model = trained
    after = outputs(model, kind)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(outputs(model, kind), after)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, kind), after)
    originals = dict(base.named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if "greentrainer_values" not in name:
            assert torch.equal(parameter, originals[name.replace(".base_layer", "")]), name


def test_forward_costs_no_flops_and_copies_no_weight(kind, trained):
    base, model = trained
    batch = make_batch(kind)
    with flop_counter() as of_base:
        base.eval()(**batch)
    with flop_counter() as of_wrapped:
        model.eval()(**batch)
    assert of_wrapped.get_total_flops() == of_base.get_total_flops()
    for layer in model.get_base_model().modules():
        if isinstance(layer, GreenTrainerLayer):
            for name, value in layer.greentrainer_values["default"].items():
                assert layer.effective_tensor(name) is value
                assert getattr(layer, name) is value


def test_a_step_costs_what_was_planned(kind, trained):
    base, model = trained
    batch = make_batch(kind)
    graph = profile(base.train(), batch)
    selected = [name for name in model.peft_config["default"].selected if name in graph.tensors]
    with flop_counter() as counter:
        output = model.train()(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    assert counter.get_total_flops() == graph.flops(selected)


def test_wrapper_attributes_are_those_of_the_module(kind, trained):
    base, model = trained
    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, GreenTrainerLayer):
            module = base.get_submodule(key)
            assert isinstance(layer, nn.LayerNorm) == isinstance(module, nn.LayerNorm)
            for name, value in vars(module).items():
                if isinstance(value, (int, float, str, tuple)) and not name.startswith("_"):
                    assert getattr(layer, name) == value
            assert hasattr(layer, "weight") == hasattr(module, "weight")
            assert hasattr(layer, "in_features") and hasattr(layer, "out_features")


def test_importing_registers_and_reloading_is_harmless():
    import importlib

    importlib.reload(peft_greentrainer)
    assert PeftType("GREENTRAINER") is PeftType.GREENTRAINER and "GREENTRAINER" in list(PeftType)
    importlib.reload(peft_greentrainer.registration).add_peft_type()
    config = GreenTrainerConfig(rho=0.4)
    assert config.peft_type is PeftType.GREENTRAINER
    assert isinstance(get_peft_model(make_model("llama"), config), PeftModel)


def test_auto_classes_load_a_delta(tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
    train_a_little(model, "llama")
    model.save_pretrained(tmp_path / "delta")
    config = PeftConfig.from_pretrained(tmp_path / "delta")
    assert isinstance(config, GreenTrainerConfig) and config.rho == 0.5
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))
    go_on = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "delta", is_trainable=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and [n for n, p in go_on.named_parameters() if p.requires_grad] == names


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


@pytest.mark.parametrize("float32", [True, False])
def test_values_are_float32_on_a_half_precision_base(float32, tmp_path):
    base = make_model("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(), autocast_adapter_dtype=float32)
    tensors = train_a_little(model, "llama")
    values = [p for n, p in model.named_parameters() if "greentrainer_values" in n]
    assert len(values) == len(tensors)
    assert {v.dtype for v in values} == {torch.float32 if float32 else torch.bfloat16}
    after = outputs(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=float32)
    assert torch.equal(outputs(loaded, "llama"), after)
    assert torch.equal(outputs(loaded.merge_and_unload(), "llama"), after)


def test_every_selected_tensor_moves_on_a_bfloat16_base_at_a_small_rate():
    model = get_peft_model(make_model("llama").bfloat16(), GreenTrainerConfig())
    base = model.get_base_model()
    tensors = sorted(candidates(base, model.peft_config["default"]))
    set_values(base, "default", tensors)
    set_selection(base, "default", tensors)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for step in range(3):
        model(**make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == len(tensors)
    assert all((p != before[n]).any() for n, p in model.named_parameters() if n in before)


def test_code_that_reads_a_childs_weight_trains_it():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = nn.functional.linear(x, self.inner.weight, self.inner.bias)
            return self.attention(x, x, x)[0]

    model = get_peft_model(Reader(), GreenTrainerConfig())
    base = model.get_base_model()
    tensors = sorted(candidates(base, model.peft_config["default"]))
    assert tensors == ["attention.out_proj.bias", "attention.out_proj.weight", "inner.bias", "inner.weight"]
    set_values(base, "default", tensors)
    set_selection(base, "default", tensors)
    model(torch.randn(2, 3, 4)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_a_module_with_two_parents_is_wrapped_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4))
            self.second = nn.ModuleDict({"same": self.first[0]})

        def forward(self, x):
            return self.second["same"](self.first(x))

    model = get_peft_model(Twice(), GreenTrainerConfig()).get_base_model()
    assert isinstance(model.first[0], GreenTrainerLayer) and model.second["same"] is model.first[0]


def test_modules_to_save_are_trained_and_saved(tmp_path):
    base = make_model("convnet")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(modules_to_save=["head"]))
    assert not any(
        name.startswith("head.") for name in candidates(model.get_base_model(), model.peft_config["default"])
    )
    train_a_little(model, "convnet")
    after = outputs(model, "convnet")
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), "convnet"), after)


class Codebook(nn.Module):
    """Used by another method than forward, and beside containers of parameters and an empty one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def decode(self, hidden):
        return hidden @ self.weight.T


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = Codebook()
        self.inner = nn.Linear(4, 4)
        self.none = nn.Linear(4, 0)
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(4)})

    def forward(self, x):
        for scale in self.scales:
            x = x * scale + self.shifts["a"]
        return self.codebook.decode(self.inner(x))


def test_methods_other_than_forward_use_effective_tensors():
    base = Decoder()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    assert candidates(model.get_base_model(), model.peft_config["default"]) == [
        "codebook.weight",
        "inner.weight",
        "inner.bias",
    ]
    x = torch.randn(3, 4)
    assert torch.equal(model(x), base(x))
    values = model.get_base_model().codebook.greentrainer_values["default"]
    model(x).sum().backward()
    assert values["weight"].grad is not None
    values["weight"].data += 1
    after = model(x)
    assert not torch.equal(after, base(x))
    assert torch.equal(model.merge_and_unload()(x), after)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_targeted_embeddings_are_not_saved_twice(targets, tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.8, target_modules=targets))
    train_a_little(model, "llama", ["lm_head.weight"] if "lm_head" in targets else ["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path)
    assert all(".greentrainer_values." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    after = outputs(model, "llama")
    assert torch.equal(outputs(PeftModel.from_pretrained(make_model("llama"), tmp_path), "llama"), after)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embeddings_are_those_that_forward_uses_and_no_tuner_layers(kind):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=1.0, init_weights=False))
    base, batch, calls = model.get_base_model(), make_batch(kind), []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert not isinstance(head, BaseTunerLayer)  # trl refuses those, and reads the weight
    assert head.weight is base.lm_head.weight is base.get_output_embeddings().weight
    assert (
        head.weight.requires_grad
        and "greentrainer_values" in dict(map(reversed, model.named_parameters()))[head.weight]
    )
    handle = embeddings.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        logits = model(**batch).logits
        assert len(calls) == 1
        handle.remove()
        embedded = embeddings(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embedded).logits, logits)
        hidden = base.model(attention_mask=batch["attention_mask"], inputs_embeds=embedded).last_hidden_state
        assert torch.equal(head(hidden), logits)


def test_a_plain_module_has_no_embeddings_and_can_be_wrapped_again(tmp_path):
    model = get_peft_model(make_model("convnet"), GreenTrainerConfig())
    assert not hasattr(model, "get_input_embeddings")
    with pytest.warns(UserWarning, match="Could not identify embedding"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        (targets, f"{module}.weight")
        for targets in (None, ["embed_tokens", "lm_head", "up_proj"], ["up_proj"])
        for module in ("lm_head", "model.layers.0.mlp.up_proj")
        if not targets or module.rpartition(".")[2] in targets
    ],
)
def test_a_resized_vocabulary(targets, trained, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")

    def resized(seed):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)  # transformers draws the new rows
        base.resize_token_embeddings(100)
        return base

    model = get_peft_model(resized(0), GreenTrainerConfig(rho=0.8, target_modules=targets))
    train_a_little(model, "llama", [trained])
    model.save_pretrained(tmp_path / "delta")
    loaded = PeftModel.from_pretrained(resized(1), tmp_path / "delta")
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))
    assert torch.equal(outputs(loaded.merge_and_unload(), "llama"), outputs(model, "llama"))


class Memory(nn.Module):
    """Tensors under names of a dictionary, a property made of a tensor, items."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(4, 4))
        self.log_scale = nn.Parameter(torch.zeros(4))

    @property
    def scale(self):
        return self.log_scale.exp()

    def forward(self, x):
        return x @ self.keys


class Shelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.rows[index]


class Library(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory, self.shelf, self.linear = Memory(), Shelf(), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.memory(x) * self.memory.scale + sum(self.shelf[i] for i in range(len(self.shelf))))


def test_unusual_modules_run_and_a_property_is_made_of_effective_tensors():
    base = Library()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(rho=1.0))
    found = candidates(model.get_base_model(), model.peft_config["default"])
    assert found == ["memory.keys", "memory.log_scale", "linear.weight", "linear.bias"]
    x = torch.randn(2, 4)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    value = model.get_base_model().memory.greentrainer_values["default"]["log_scale"]
    assert value.grad.any()
    value.data += 1
    assert torch.equal(model.get_base_model().memory.scale, value.exp())


def test_threads_that_share_a_model_leave_the_base_alone():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=1.0, init_weights=False)).eval()
    base = {name: p.clone() for name, p in model.named_parameters()}
    batch, interval = make_batch("llama", rows=1, tokens=4), sys.getswitchinterval()
    with torch.no_grad():
        expected = model(**batch).logits

        def run(_):
            with torch.no_grad():
                return all(torch.equal(model(**batch).logits, expected) for _ in range(10))

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(run, range(8)))
        finally:
            sys.setswitchinterval(interval)
    assert all(p is not None and torch.equal(p, base[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5"])
def test_a_merged_model_that_changes_its_type_is_unmerged_in_it(kind):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=1.0, init_weights=False))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for name, p in model.named_parameters()} == {torch.bfloat16}
    with model.disable_adapter():
        assert torch.equal(outputs(model, kind), outputs(make_model(kind).bfloat16(), kind))


def test_a_model_that_was_merged_in_inference_mode_can_be_trained():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(init_weights=False))
    with torch.inference_mode():
        merged = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged(**make_batch("llama")).loss.backward()
    torch.optim.SGD(merged.parameters(), lr=0.1).step()


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


def test_an_adapter_that_has_no_place_in_some_modules_is_trained_alone():
    for first, second in (({}, {"target_modules": ["q_proj"]}), ({"target_modules": ["q_proj"]}, {})):
        model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.9, **first))
        model.add_adapter("second", GreenTrainerConfig(rho=0.9, **second))
        model.set_adapter("second")
        Loop(model).run(3)
        assert model.base_model.selection.tensors
        assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)


def test_what_is_not_supported_is_refused():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    with pytest.raises(ValueError, match="adapter_names"):
        model(**make_batch("llama"), adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="Add the adapter with modules_to_save first"):
        model.add_adapter("second", GreenTrainerConfig(modules_to_save=["lm_head"]))
