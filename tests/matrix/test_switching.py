"""Adapters that are disabled, switched, trained, deleted; what is told of them."""

from contextlib import nullcontext

import pytest
import torch
from helpers.cases import heads, trainable
from peft import PeftModel, get_model_status

from peft_greentrainer.adapter.values import layers


def test_a_disabled_adapter_is_the_base_and_comes_back(case, tmp_path):
    model = case.model()
    base, output, flags = case.output(case.base()), case.output(model), trainable(model)
    assert not case.same(output, base)
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


def test_an_irregular_state_comes_back_too(case, tmp_path):
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


def test_each_adapter_is_trained_alone(case, tmp_path):
    model = case.model(["default", "other"])
    assert trainable(model) and all(".default." in name for name in trainable(model))
    model.set_adapter("other")
    assert trainable(model) and all(".other." in name for name in trainable(model))
    model.set_requires_grad("other", False)
    assert not trainable(model)
    model.set_requires_grad("other")
    assert trainable(model) and all(".other." in name for name in trainable(model))
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)


def test_one_is_loaded_for_training_and_one_for_inference(case, tmp_path):
    case.model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    flags = trainable(model)
    assert flags
    model.load_adapter(tmp_path, "other", is_trainable=False)
    assert trainable(model) == flags
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    loaded.load_adapter(tmp_path, "other", is_trainable=True)
    assert not any(".default." in name for name in trainable(loaded))
    loaded.set_adapter("other")
    assert trainable(loaded) == {name.replace(".default.", ".other.") for name in flags}


def test_only_what_is_trainable_is_trained(case, tmp_path):
    model = case.model(["default", "other"], rho=0.7)
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


def test_a_deleted_adapter_is_gone(case, tmp_path):
    model = case.model(["default", "other"])
    output = case.output(model)
    model.delete_adapter("other")
    assert "other" not in model.peft_config and not any(".other." in name for name, _ in model.named_parameters())
    assert case.same(case.output(model), output)
    for layer in layers(model).values():
        for attribute in vars(layer).values():
            assert not isinstance(attribute, dict) or "other" not in attribute
    model.add_adapter("other", case.config(init_weights=False))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    assert not case.same(case.output(model), case.output(case.base()))


# Telling


def test_the_status_tells_the_truth(case, tmp_path):
    model = case.model(["default", "other"])
    status = get_model_status(model)
    assert status.active_adapters == ["default"] and sorted(status.available_adapters) == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.enabled is True and status.merged_adapters == []
    assert status.peft_types == {"default": "GREENTRAINER", "other": "GREENTRAINER"}
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
