"""peft's own promises of a method, after its tests: every model and config goes through every check."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.models import TASKS, make_batch, make_model
from peft import (
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_greentrainer import GreenTrainerConfig, GreenTrainerLayer
from peft_greentrainer.adapter.values import layers


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 3)
        self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.last(self.lin1(torch.relu(self.norm(self.lin0(x))))).log_softmax(-1)


class EmbeddingConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 8)
        self.conv1d = Conv1D(6, 8)
        self.conv2d = nn.Conv2d(1, 4, 3, groups=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.conv2d(self.conv1d(self.emb(x))[:, None]).flatten(2).transpose(1, 2)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.recurrent(hidden)[0].mean(1))


PLAIN = {
    "mlp": (Mlp, {"x": torch.linspace(-1, 1, 60).view(6, 10)}),
    "many kinds": (EmbeddingConv1d, {"x": torch.arange(60).view(6, 10) % 50}),
}

CASES = [
    ("mlp", {}),
    ("mlp", {"target_modules": ["lin0"]}),
    ("mlp", {"target_modules": ["lin0", "norm"], "rho": 0.6}),
    ("mlp", {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
    ("mlp", {"target_modules": "all-linear"}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("mlp", {"modules_to_save": ["last", "norm"]}),
    ("many kinds", {}),
    ("many kinds", {"target_modules": ["emb", "conv1d", "attention.out_proj"]}),
    ("many kinds", {"target_modules": ["conv2d", "recurrent"], "modules_to_save": ["head"]}),
    ("llama-tied", {}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("gpt2", {"exclude_modules": r".*(wte|lm_head)"}),
    ("t5", {}),
    *((kind, {}) for kind in TASKS),
    ("bert-sequences", {"target_modules": ["query", "value"]}),
    ("llama-sequences", {"layers_to_transform": 1}),
    ("mlp", {"low_rank": "also", "r": 2}),
    ("mlp", {"low_rank": "only", "target_modules": ["lin0", "norm"], "modules_to_save": ["last"]}),
    ("many kinds", {"low_rank": "also", "r": 2}),
    ("llama-tied", {"low_rank": "only", "r": 2}),
    ("gpt2", {"low_rank": "also", "r": 2}),
    ("t5", {"low_rank": "only", "r": 2}),
    ("bert-sequences", {"low_rank": "also", "r": 2, "target_modules": ["query", "value"]}),
]
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Case:
    """A model and a config: makes adapters that change the output, and tells what it is."""

    def __init__(self, kind, options):
        self.kind = kind
        task = {"task_type": TASKS[kind][3]} if kind in TASKS else {}
        self.options = {"rho": 1.0, "init_weights": False} | task | options

    def base(self):
        torch.manual_seed(0)
        return PLAIN[self.kind][0]() if self.kind in PLAIN else make_model(self.kind)

    def config(self, **changes):
        return GreenTrainerConfig(**copy.deepcopy(self.options | changes))

    def model(self, adapters=("default",), **changes):
        model = get_peft_model(self.base(), self.config(**changes), adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, self.config(**changes))
        return model

    def batch(self):
        return copy.copy(PLAIN[self.kind][1]) if self.kind in PLAIN else make_batch(self.kind)

    def output(self, model):
        with torch.no_grad():
            output = model.eval()(**self.batch())
        if isinstance(output, torch.Tensor):
            return output
        found = {name: value for name, value in output.items() if name != "loss" and torch.is_tensor(value)}
        return torch.cat([value.flatten() for value in found.values()])

    def same(self, output, expected):
        # Whether fused kernels run depends on what requires grad and on the class of a child.
        return torch.allclose(output, expected, rtol=0, atol=1e-6 if self.kind == "many kinds" else 0)

    def same_merged(self, output, expected):
        # As LoRA's: an update is rounded where it is added to the output, or to the weight.
        tolerance = 1e-4 if "low_rank" in self.options else 0
        return self.same(output, expected) or torch.allclose(output, expected, rtol=tolerance, atol=tolerance)

    def loss(self, model):
        output = model.train()(**self.batch())
        if isinstance(output, torch.Tensor):
            return output.square().mean()
        return output.last_hidden_state.square().mean() if output.get("loss") is None else output.loss


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def moved(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)


def heads(model):
    return {name for name in trainable(model) if ".modules_to_save." in name}


# Names and files


@check
def the_name_of_the_adapter_makes_no_difference(case, path):
    states = []
    for name in ("default", "other", "a_with_default_in_it", "base_layer", "lin"):
        model = case.model([name])
        assert model.active_adapter == name
        states.append((case.output(model), get_peft_model_state_dict(model, adapter_name=name)))
    for output, state in states[1:]:
        assert case.same(output, states[0][0]) and state.keys() == states[0][1].keys()
    assert not any("default" in key for key in states[0][1])


@check
def names_that_are_substrings_of_each_other_are_kept_apart(case, path):
    names = ["default", "def", "efault"]
    model = case.model(names)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = case.output(model)
    model.save_pretrained(path)
    loaded = PeftModel.from_pretrained(case.base(), path)
    for name in names[1:]:
        loaded.load_adapter(path / name, name)
    for name in names:
        loaded.set_adapter(name)
        assert case.same(case.output(loaded), expected[name])


@check
def what_is_saved_is_what_is_loaded(case, path):
    model = case.model()
    output = case.output(model)
    assert not case.same(output, case.output(case.base()))
    for safe in (True, False):
        model.save_pretrained(path / str(safe), safe_serialization=safe)
        assert (path / str(safe) / f"adapter_model.{'safetensors' if safe else 'bin'}").exists()
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(case.base(), path / str(safe), low_cpu_mem_usage=low_cpu_mem_usage)
            assert case.same(case.output(loaded), output)
            assert not trainable(loaded) and not any(p.is_meta for p in loaded.parameters())


@check
def only_the_selected_adapters_are_saved(case, path):
    model = case.model(["default", "first", "second"])
    model.save_pretrained(path, selected_adapters=["first"])
    assert not (path / "adapter_config.json").exists() and not (path / "second").exists()
    model.set_adapter("first")
    loaded = PeftModel.from_pretrained(case.base(), path / "first")
    assert case.same(case.output(loaded), case.output(model))


@check
def the_config_is_made_from_the_file(case, path):
    model = case.model()
    model.save_pretrained(path)
    config = GreenTrainerConfig.from_pretrained(path)
    loaded = PeftModel.from_pretrained(case.base(), path, config=config)
    assert loaded.peft_config["default"] is config and config.tensors == model.peft_config["default"].tensors
    assert case.same(case.output(loaded), case.output(model))


@check
def it_is_injected_and_read_without_a_peft_model(case, path):
    model = case.model()
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    config = copy.deepcopy(model.peft_config["default"])
    for low_cpu_mem_usage in (False, True):
        for state_dict in (None, state):
            injected = inject_adapter_in_model(
                copy.deepcopy(config), case.base(), low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
            )
            result = set_peft_model_state_dict(injected, state, low_cpu_mem_usage=low_cpu_mem_usage)
            assert not result.unexpected_keys
            assert case.same(case.output(injected), case.output(model))
            assert get_peft_model_state_dict(injected).keys() == state.keys()


@check
def an_older_state_takes_the_place_of_the_values(case, path):
    model = case.model()
    before, state = case.output(model), copy.deepcopy(get_peft_model_state_dict(model))
    moved(p for p in model.parameters() if p.requires_grad)
    assert not case.same(case.output(model), before)
    set_peft_model_state_dict(model, state)
    assert case.same(case.output(model), before)


@check
def the_state_of_the_base_is_that_of_the_base(case, path):
    from peft import get_base_model_state_dict

    state = get_base_model_state_dict(case.model())
    expected = case.base().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@check
def it_is_copied_and_pickled(case, path):
    model = case.model()
    output = case.output(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert case.same(case.output(copied), output) and trainable(copied) == trainable(model)


# Merging


@check
def merged_is_what_it_was(case, path):
    for safe_merge in (False, True):
        model = case.model()
        output = case.output(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert type(merged) is type(case.base()) and case.same_merged(case.output(merged), output)
        assert not any(isinstance(module, GreenTrainerLayer) for module in merged.modules())
        assert not hasattr(merged, "peft_config")


@check
def unmerging_and_unloading_restore_the_base_bit_for_bit(case, path):
    model = case.model()
    output = case.output(model)
    expected = case.base().state_dict()
    for _ in range(3):
        model.merge_adapter()
        assert case.same_merged(case.output(model), output)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is merged already
            model.merge_adapter()
        assert case.same_merged(case.output(model), output)
        model.unmerge_adapter()
        assert case.same(case.output(model), output)
    state = model.unload().state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@check
def a_safe_merge_refuses_what_is_not_finite(case, path):
    for value in (float("nan"), float("inf")):
        model = case.model()
        state = {name: p.clone() for name, p in model.named_parameters()}
        last = [p for name, p in model.named_parameters() if "greentrainer_values" in name][-1]
        last.data.view(-1)[0] = value
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="NaNs detected in the merged weights.*default seems to be broken"):
                merge(safe_merge=True)
            broken = {name for name, p in model.named_parameters() if not torch.equal(p, state[name])}
            assert len(broken) == 1 and "greentrainer_values" in broken.pop()
            assert not any(layer.merged for layer in layers(model).values())


@check
def merging_one_after_the_other_is_merging_both(case, path):
    if case.options.get("modules_to_save") or case.options.get("task_type") in (
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
    ):
        return  # peft allows one active adapter with the same modules_to_save
    model = case.model(["default", "second"])
    expected = case.base().state_dict()
    single = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        single[name] = case.output(model)
    model.base_model.set_adapter(["default", "second"])
    both = case.output(model)
    assert not torch.equal(both, single["default"]) and not torch.equal(both, single["second"])
    for merges in ([["default", "second"]], [["default"], ["second"]]):
        for names in merges:
            model.merge_adapter(names)
        torch.testing.assert_close(case.output(model), both)
        model.unmerge_adapter()
        state = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    model.merge_adapter(["default"])
    layer = next(iter(layers(model).values()))
    assert layer.merged_adapters == ["default"]


# Switching


@check
def a_disabled_adapter_is_the_base_and_comes_back(case, path):
    model = case.model()
    base, output, flags = case.output(case.base()), case.output(model), trainable(model)
    with model.disable_adapter():
        assert case.same(case.output(model), base) and not trainable(model)
        with model.disable_adapter():
            assert case.same(case.output(model), base)
        assert case.same(case.output(model), base)
    assert case.same(case.output(model), output) and trainable(model) == flags
    model.merge_adapter()
    with model.disable_adapter():
        assert case.same(case.output(model), base)
    model.unmerge_adapter()
    assert case.same(case.output(model), output)


@check
def an_irregular_state_comes_back_too(case, path):
    model = case.model()
    wrappers = list(layers(model).values())
    for layer in wrappers[::2]:
        layer.enable_adapters(False)
    irregular = get_model_status(model).enabled == "irregular"
    output = case.output(model)
    with pytest.warns(UserWarning) if irregular else nullcontext():
        with model.disable_adapter():
            assert case.same(case.output(model), case.output(case.base()))
    if not irregular:  # all were disabled, and stay so
        assert get_model_status(model).enabled is False
        assert case.same(case.output(model), output)


@check
def each_adapter_is_trained_alone(case, path):
    model = case.model(["default", "second"])
    assert trainable(model) and all(".default." in name for name in trainable(model))
    model.set_adapter("second")
    assert trainable(model) and all(".second." in name for name in trainable(model))
    model.set_requires_grad("second", False)
    assert not trainable(model)
    model.set_requires_grad("second")
    assert trainable(model) and all(".second." in name for name in trainable(model))
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)


@check
def one_is_loaded_for_training_and_one_for_inference(case, path):
    case.model().save_pretrained(path)
    model = PeftModel.from_pretrained(case.base(), path, is_trainable=True)
    flags = trainable(model)
    assert flags
    model.load_adapter(path, "second", is_trainable=False)
    assert trainable(model) == flags
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(case.base(), path)
    loaded.load_adapter(path, "second", is_trainable=True)
    assert not any(".default." in name for name in trainable(loaded))
    loaded.set_adapter("second")
    assert trainable(loaded) == {name.replace(".default.", ".second.") for name in flags}


@check
def only_what_is_trainable_is_trained(case, path):
    model = case.model(["default", "second"], rho=0.7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        case.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= flags and len(changed) > 0
    assert changed & heads(model) or not heads(model)


# Deleting


@check
def a_deleted_adapter_is_gone(case, path):
    model = case.model(["default", "second"])
    output = case.output(model)
    model.delete_adapter("second")
    assert "second" not in model.peft_config and not any(".second." in name for name, _ in model.named_parameters())
    assert case.same(case.output(model), output)
    for layer in layers(model).values():
        for attribute in vars(layer).values():
            assert not isinstance(attribute, dict) or "second" not in attribute
    model.add_adapter("second", case.config())
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    assert not case.same(case.output(model), case.output(case.base()))


# Telling


@check
def the_status_tells_the_truth(case, path):
    model = case.model(["default", "second"])
    status = get_model_status(model)
    assert status.active_adapters == ["default"] and sorted(status.available_adapters) == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.enabled is True and status.merged_adapters == []
    assert status.peft_types == {"default": "GREENTRAINER", "second": "GREENTRAINER"}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert status.total_params == sum(sizes.values())
    assert status.trainable_params == sum(sizes[name] for name in trainable(model))
    assert model.get_nb_trainable_parameters() == (status.trainable_params, status.total_params)
    assert status.num_adapter_layers == len(model.get_layer_status())
    model.merge_adapter()
    ours = [layer for layer in model.get_layer_status() if layer.module_type.startswith("greentrainer.")]
    assert len(ours) == len(layers(model)) and all(layer.merged_adapters == ["default"] for layer in ours)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


@check
def in_and_out_features_are_there(case, path):
    model, base = case.model(), case.base()
    for key, layer in layers(model).items():
        module = base.get_submodule(key)
        assert layer.in_features == getattr(module, "in_features", getattr(module, "nx", None))
        assert layer.out_features == getattr(module, "out_features", getattr(module, "nf", None))


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_peft(case, function, tmp_path):
    function(Case(*case), tmp_path)
