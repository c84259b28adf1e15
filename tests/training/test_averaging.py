"""Averages of models in training are those of a plain model whose same tensors take the same values."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.adapter.values import layers
from peft_greentrainer.tensors.names import PREFIX


def rounding_average(average, new, count):
    return 0.7 * average + 0.3 * new  # of equal numbers it is not that number


AVERAGES = {
    "equal": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.8)},
    "own": {"avg_fn": rounding_average},
    "buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}


def make(kind="llama", **config):
    return get_peft_model(make_model(kind), GreenTrainerConfig(**{"rho": 0.6, "reselect": 2} | config))


def effective_tensors(model):
    """What a plain model with the tensors of this one holds."""
    return {
        f"{key}.{name}": layer.effective_tensor(name).detach().clone()
        for key, layer in layers(model).items()
        for name, _ in layer.base_layer.named_parameters(recurse=False)
    }


def take_over(plain, model):
    with torch.no_grad():
        for name, tensor in effective_tensors(model).items():
            plain.get_parameter(name).copy_(tensor)


def check_base_is_untouched(model, kind="llama"):
    base = dict(make_model(kind).named_parameters(remove_duplicate=False))
    checked = [
        torch.equal(p, base[name.removeprefix(PREFIX).replace(".base_layer.", ".")])
        for name, p in model.named_parameters()
        if "greentrainer_values" not in name
    ]
    assert checked and all(checked)


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize(("kind", "begin"), [("llama", 2), ("llama", 5), ("t5", 2), ("gpt2", 4)])
def test_an_average_of_a_changing_set_is_that_of_the_plain_tensors(kind, begin, options):
    model, plain = make(kind), make_model(kind)
    loop = Loop(model, kind).run(
        begin
    )  # to the first selection: what was trained for its sake only is forgotten there
    take_over(plain, model)
    average, expected = AveragedModel(model, **options), AveragedModel(plain, **options)
    sets = set()
    for _ in range(8):
        loop.step()
        take_over(plain, model)
        average.update_parameters(model)
        expected.update_parameters(plain)
        sets.add(frozenset(model.peft_config["default"].tensors))
    assert len(sets) > 1
    found = effective_tensors(average.module)
    for name, tensor in expected.module.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-6, atol=1e-7)
    check_base_is_untouched(average.module, kind)
    check_base_is_untouched(model, kind)
    torch.testing.assert_close(outputs(average.module, kind), outputs(expected.module, kind))
    config, other = average.module.peft_config["default"], model.peft_config["default"]
    assert (config.tensors, config.selected) == (other.tensors, other.selected)


def test_factors_are_averaged_by_name_from_those_that_were_drawn():
    model = make(low_rank="only", r=2)
    loop = Loop(model).run(2)
    average, expected = AveragedModel(model, avg_fn=get_ema_avg_fn(0.8)), {}
    for step in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "greentrainer_values" in name}
        loop.step()
        average.update_parameters(model)
        for name, p in model.named_parameters():
            if "greentrainer_values" in name:
                start = expected.get(name, before.get(name, p.detach()))  # new ones were not trained yet
                expected[name] = p.detach().clone() if step == 0 else torch.lerp(start, p.detach(), 0.2)
    found = {name: p for name, p in average.module.named_parameters() if "greentrainer_values" in name}
    assert found.keys() == expected.keys() and len(found) > 4
    for name, factor in found.items():
        torch.testing.assert_close(factor.detach(), expected[name], rtol=1e-6, atol=1e-7)
    check_base_is_untouched(average.module)


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_an_average_can_be_made_at_any_time_used_saved_and_loaded(begin, tmp_path):
    model = make()
    loop = Loop(model).run(begin)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(5):
        loop.step()
        average.update_parameters(model)
        with torch.no_grad():
            average(**make_batch("llama"))
    check_base_is_untouched(average.module)
    expected = outputs(average.module, "llama")
    average.module.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(make_model("llama"), tmp_path), "llama"), expected)
    new = AveragedModel(make())
    new.load_state_dict(average.state_dict())
    assert torch.equal(outputs(new.module, "llama"), expected) and new.n_averaged == 5
    assert torch.equal(outputs(pickle.loads(pickle.dumps(average.module)), "llama"), expected)
    assert torch.equal(outputs(copy.deepcopy(average).module, "llama"), expected)
    assert torch.equal(outputs(average.module.merge_and_unload(), "llama"), expected)


def test_an_average_of_a_container_with_a_batch_norm_and_a_head():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make("convnet", reselect=1)
            self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 5)

        def forward(self, images, labels):
            return nn.functional.cross_entropy(self.head(self.norm(self.inner(images))), labels)

    torch.manual_seed(0)
    model = Container()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    head = model.head.weight.detach().clone()
    for step in range(4):
        model(**make_batch("convnet", seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        head = model.head.weight.detach().clone() if step == 0 else torch.lerp(head, model.head.weight.detach(), 0.5)
        torch.testing.assert_close(average.module.head.weight.detach(), head)
        assert torch.equal(average.module.norm.running_mean, model.norm.running_mean)


def test_half_precision():
    model = get_peft_model(make_model("llama").to(torch.bfloat16), GreenTrainerConfig(rho=0.6, reselect=2))
    model.to(torch.bfloat16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    loop = Loop(model, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4))
    for _ in range(5):
        loop.step()
        average.update_parameters(model)
    for name, p in average.module.named_parameters():
        assert p.dtype == dict(model.named_parameters())[name].dtype, name


def test_an_adapter_that_was_added_later_is_refused():
    model = make()
    average = AveragedModel(model)
    model.add_adapter("second", GreenTrainerConfig(rho=0.6))
    with pytest.raises(ValueError, match="made before the adapter 'second' was added: make it anew"):
        average.update_parameters(model)


def test_other_models_are_averaged_as_ever_and_importing_again_changes_nothing():
    def averaged():
        model = make_model("convnet")
        average = AveragedModel(model, avg_fn=rounding_average)
        for i in range(3):
            with torch.no_grad():
                for p in list(model.parameters())[::2]:
                    p.add_(i)
            average.update_parameters(model)
        return average.state_dict()

    expected = averaged()
    original = AveragedModel.update_parameters.original
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("peft_greentrainer")}
    try:
        importlib.import_module("peft_greentrainer")
        assert AveragedModel.update_parameters.original is original
        found = averaged()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    finally:
        sys.modules.update(kept)
        kept["peft_greentrainer"].registration.register(
            kept["peft_greentrainer"].GreenTrainerConfig, kept["peft_greentrainer"].GreenTrainerModel
        )
        kept["peft_greentrainer"].registration.register_card(kept["peft_greentrainer.sharing.card"].describe)
        kept["peft_greentrainer.training.averaging"].follow_selections()


@pytest.mark.parametrize("resumed", [False, True])
def test_lightnings_averaging_exchanges_the_same_tensors(resumed, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from lightning_loop import Tuning

    class Validated(Tuning):
        def validation_step(self, batch, index):
            check_base_is_untouched(self.model)
            self.losses.append(self.model(**batch).loss.item())

    def fit(epochs, **options):
        torch.manual_seed(0)
        tuning = Validated(make(reselect=3).train())
        tuning.losses = []
        batch = make_batch("llama", rows=8)
        data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
        callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, save_last=True)]
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            callbacks=callbacks,
        )
        trainer.fit(tuning, DataLoader(data, batch_size=4), DataLoader(data, batch_size=8), **options)
        return tuning

    tuning = fit(5)
    assert len(tuning.losses) == 5 and tuning.losses[-1] < tuning.losses[0]
    if resumed:
        tuning = fit(7, ckpt_path=str(tmp_path / "last.ckpt"))
        assert len(tuning.losses) == 2
    check_base_is_untouched(tuning.model)
    assert tuning.model(**make_batch("llama", rows=8)).loss.item() == pytest.approx(tuning.losses[-1], rel=1e-5)
