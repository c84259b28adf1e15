"""Merging, unmerging and unloading."""

import warnings

import pytest
import torch
from helpers.cases import tied
from peft import get_base_model_state_dict

from peft_greentrainer import GreenTrainerLayer
from peft_greentrainer.adapter.values import layers


def test_merged_is_what_it_was(case, tmp_path):
    for safe_merge in (False, True):
        model = case.model()
        output = case.output(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        base = case.base()
        assert type(merged) is type(base) and case.same_merged(case.output(merged), output)
        assert list(merged.state_dict()) == list(base.state_dict()) and tied(merged) == tied(base)
        assert not any(isinstance(module, GreenTrainerLayer) for module in merged.modules())
        assert not hasattr(merged, "peft_config")


def test_unmerging_and_unloading_restore_the_base_bit_for_bit(case, tmp_path):
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
        state = get_base_model_state_dict(model)
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    unloaded = model.unload()
    assert case.same(case.output(unloaded), case.output(case.base()))
    state = unloaded.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_safe_merge_refuses_what_is_not_finite(case, tmp_path):
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


def test_merging_one_after_the_other_is_merging_both(case, tmp_path):
    if case.options.get("modules_to_save") or case.options.get("task_type") in (
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
    ):
        return  # peft allows one active adapter with the same modules_to_save
    model = case.model(["default", "other"])
    expected = case.base().state_dict()
    single = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = case.output(model)
    model.base_model.set_adapter(["default", "other"])
    both = case.output(model)
    assert not torch.equal(both, single["default"]) and not torch.equal(both, single["other"])
    for merges in ([["default", "other"]], [["default"], ["other"]]):
        for names in merges:
            model.merge_adapter(names)
        torch.testing.assert_close(case.output(model), both)
        model.unmerge_adapter()
        state = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    model.merge_adapter(["default"])
    layer = next(iter(layers(model).values()))
    assert layer.merged_adapters == ["default"]
