"""What is saved, loaded, injected, copied and pickled, and under which names."""

import copy
import pickle
import warnings

import torch
from helpers.cases import moved, trainable
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from peft_greentrainer import GreenTrainerConfig


def test_the_name_of_the_adapter_makes_no_difference(case, tmp_path):
    states = []
    for name in ("default", "other", "a_with_default_in_it", "base_layer", "lin"):
        model = case.model([name])
        assert model.active_adapter == name
        states.append((case.output(model), get_peft_model_state_dict(model, adapter_name=name)))
    for output, state in states[1:]:
        assert case.same(output, states[0][0]) and state.keys() == states[0][1].keys()
    assert not any("default" in key for key in states[0][1])


def test_names_that_are_substrings_of_each_other_are_kept_apart(case, tmp_path):
    names = ["default", "def", "efault"]
    model = case.model(names)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = case.output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    for name in names[1:]:
        loaded.load_adapter(tmp_path / name, name)
    for name in names:
        loaded.set_adapter(name)
        assert case.same(case.output(loaded), expected[name])


def test_what_is_saved_is_what_is_loaded(case, tmp_path):
    model = case.model()
    output = case.output(model)
    assert not case.same(output, case.output(case.base()))
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        assert (tmp_path / str(safe) / f"adapter_model.{'safetensors' if safe else 'bin'}").exists()
        for low_cpu_mem_usage in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", FutureWarning)  # of peft's own use of transformers
                loaded = PeftModel.from_pretrained(
                    case.base(), tmp_path / str(safe), low_cpu_mem_usage=low_cpu_mem_usage
                )
            assert case.same(case.output(loaded), output)
            assert not trainable(loaded) and not any(p.is_meta for p in loaded.parameters())
    assert case.same_merged(case.output(loaded.merge_and_unload()), output)


def test_only_the_selected_adapters_are_saved(case, tmp_path):
    model = case.model(["default", "another", "other"])
    model.save_pretrained(tmp_path, selected_adapters=["another"])
    assert not (tmp_path / "adapter_config.json").exists() and not (tmp_path / "other").exists()
    model.set_adapter("another")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "another")
    assert case.same(case.output(loaded), case.output(model))


def test_the_config_is_made_from_the_file(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    config = GreenTrainerConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.tensors == model.peft_config["default"].tensors
    assert case.same(case.output(loaded), case.output(model))


def test_it_is_injected_and_read_without_a_peft_model(case, tmp_path):
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


def test_an_older_state_takes_the_place_of_the_values(case, tmp_path):
    model = case.model()
    before, state = case.output(model), copy.deepcopy(get_peft_model_state_dict(model))
    moved(p for p in model.parameters() if p.requires_grad)
    assert not case.same(case.output(model), before)
    set_peft_model_state_dict(model, state)
    assert case.same(case.output(model), before)


def test_the_state_of_the_base_is_that_of_the_base(case, tmp_path):
    state = get_base_model_state_dict(case.model())
    expected = case.base().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_it_is_copied_and_pickled(case, tmp_path):
    model = case.model()
    output = case.output(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert case.same(case.output(copied), output) and trainable(copied) == trainable(model)
