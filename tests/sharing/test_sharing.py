"""What leaves the machine: the card, the Hub, LoRA adapters, plain tensors; and saving of whole models."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.hub import Hub
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from huggingface_hub import ModelCard
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft import (
    convert_to_lora as convert_of_peft,
)
from peft import (
    save_as_lora as save_of_peft,
)
from safetensors.torch import load_file
from torch import nn

from peft_greentrainer import GreenTrainerConfig, convert_to_lora, export_tensors, save_as_lora
from peft_greentrainer.adapter.layer import GreenTrainerLayer


def trained(kind="llama", tensors=None, **options):
    base = make_model(kind)
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(**options))
    train_a_little(model, kind, tensors)
    return base, model


# The card


def test_the_card_says_what_was_trained_and_how_to_load_it(tmp_path):
    _, model = trained(tensors=["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], rho=0.4)
    model.peft_config["default"].spent = {"steps": 60, "full_steps": 25.2}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My model\n\nMy words.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "greentrainer" in card.data.tags and card.data.license == "mit"
    assert card.data.library_name == "peft"
    text = card.text
    assert "import peft_greentrainer" in text and "LlamaForCausalLM.from_pretrained" in text
    assert "0.4 of the FLOPs" in text and "60 steps" in text and "25.2 steps of full fine-tuning" in text
    assert "58 % were saved" in text
    assert "| `model.layers.*.mlp.up_proj.weight` | 2 | 4,096 |" in text and "| in all | 2 | 4,096 |" in text
    assert text.count("How it was trained") == 1 and text.count("My words.") == 1
    assert text.index("# My model") < text.index("How to load it") < text.index("My words.")


def test_cards_of_other_methods_are_left_alone(tmp_path):
    get_peft_model(make_model("llama"), LoraConfig()).save_pretrained(tmp_path)
    assert "greentrainer" not in (tmp_path / "README.md").read_text()


# The Hub

PUSH = """
import peft_greentrainer
from helpers.models import make_model
from peft import get_peft_model
from transformers import LlamaForCausalLM

make_model("llama").push_to_hub("me/base")
model = get_peft_model(LlamaForCausalLM.from_pretrained("me/base"), peft_greentrainer.GreenTrainerConfig(init_weights=False))
model.push_to_hub("me/delta")
print(sum(p.double().sum().item() for p in model.merge_and_unload().parameters()))
"""

LOAD = """
import peft_greentrainer
from peft import AutoPeftModel, PeftModel
from transformers import LlamaForCausalLM

for model in (
    AutoPeftModel.from_pretrained("me/delta"),
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/base"), "me/delta"),
):
    print(sum(p.double().sum().item() for p in model.merge_and_unload().parameters()))
"""


def test_pushed_to_the_hub_and_loaded_from_it(tmp_path):
    with Hub() as hub:

        def run(code):
            paths = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
            environment = os.environ | hub.environment | paths
            process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert process.returncode == 0, process.stderr
            return process.stdout.split()

        (pushed,) = run(PUSH)
        assert run(LOAD) == [pushed, pushed]
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.files["me/delta"].keys()
        card = ModelCard(hub.files["me/delta"]["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.base_model == "me/base" and not card.data.license
    assert {"greentrainer", "base_model:adapter:me/base"} <= set(card.data.tags)
    assert "import peft_greentrainer  # pip install peft-greentrainer" in card.text


# As LoRA


def test_a_delta_of_linear_weights_becomes_a_lora_adapter_by_our_function_and_by_that_of_peft(tmp_path):
    base, model = trained(target_modules=["k_proj", "v_proj"])
    after = outputs(model, "llama")
    assert save_as_lora(tmp_path / "ours", model, rank=16) == []
    assert model.supports_lora_conversion()
    save_of_peft(tmp_path / "peft", model, rank=16)
    for name in ("ours", "peft"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(outputs(loaded, "llama"), after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs(base, "llama"), after, rtol=1e-4, atol=1e-4)
    trained_modules = {name.removesuffix(".weight") for name in model.peft_config["default"].tensors}
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys} == trained_modules


def test_conversion_names_what_lora_cannot_hold():
    _, model = trained(tensors=["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
    config, state_dict, left_out = convert_to_lora(model, rank=0.9)
    assert left_out == ["model.embed_tokens.weight", "model.norm.weight"]
    assert config.target_modules == {"model.layers.0.mlp.up_proj"}
    factor_a, factor_b = state_dict.values()
    delta = model.get_base_model().model.layers[0].mlp.up_proj.get_delta_weight("default")
    assert torch.dist(factor_b @ factor_a, delta) ** 2 <= 0.1 * delta.norm() ** 2 + 1e-9
    assert len(factor_a) < 32
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_of_peft(model, rank=4)
    with pytest.raises(ValueError, match="no linear weight"):
        convert_to_lora(trained(tensors=["model.norm.weight"])[1], rank=4)
    with pytest.raises(ValueError, match="rank must be"):
        convert_to_lora(model, rank=0)


def test_conv1d_of_transformers_is_converted(tmp_path):
    base, model = trained("gpt2", tensors=["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"])
    assert save_as_lora(tmp_path, model, rank=32) == []
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(outputs(loaded, "gpt2"), outputs(model, "gpt2"), rtol=1e-4, atol=1e-4)


# As plain tensors


@pytest.mark.parametrize("kind", ["llama-tied", "t5", "gpt2"])
def test_exported_tensors_patch_the_base(kind):
    base, model = trained(kind)
    tensors = export_tensors(model)
    assert tensors.keys() == model.peft_config["default"].tensors.keys() <= dict(base.named_parameters()).keys()
    after = outputs(model, kind)
    assert not base.load_state_dict(tensors, strict=False).unexpected_keys
    assert torch.equal(outputs(base, kind), after)


def test_exported_tensors_have_the_number_format_of_the_base_and_bring_modules_to_save():
    base = make_model("llama").bfloat16()
    model = get_peft_model(base, GreenTrainerConfig(modules_to_save=["lm_head"]))
    tensors = export_tensors(model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and "lm_head.weight" in tensors


# Whole models


def test_a_model_is_pickled_and_copied_at_any_time(tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        loss = model(**make_batch("llama", seed=step)).loss
        copies = [copy.deepcopy(model)]
        torch.save(model, tmp_path / "model.pt")
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    torch.save(model, tmp_path / "model.pt")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(outputs(copied, "llama"), outputs(model, "llama"))
        assert [name for name, p in copied.named_parameters() if p.requires_grad] == names
        copies.append(copied)
    for copied in copies:  # each goes on training by itself, a copy that was made within a probe too
        optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3, 6):
            copied(**make_batch("llama", seed=step)).loss.backward()
            optimizer.step()
            copied.base_model.update_and_allocate(step, optimizer)
            optimizer.zero_grad()
        assert copied.base_model.selection.ratio <= 0.5
        assert copied.peft_config["default"].spent["steps"] >= 3


def test_a_pickled_model_is_loaded_where_the_package_was_not_imported(tmp_path):
    torch.save(get_peft_model(make_model("llama"), GreenTrainerConfig()), tmp_path / "model.pt")
    code = f"import torch; print(type(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False).base_model).__name__)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "GreenTrainerModel", process.stderr


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "convnet"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapped_model_is_compiled_and_exported(kind, strict):
    _, model = trained(kind)
    after = outputs(model, kind)
    batch = make_batch(kind)
    del batch["labels"]
    if kind not in ("bert", "convnet"):
        batch["use_cache"] = False

    def logits(output):
        return output if isinstance(output, torch.Tensor) else output["logits"]

    exported = torch.export.export(model, (), batch, strict=strict).module()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(exported(**batch)), after)
        torch.testing.assert_close(logits(compiled(**batch)), after)


def test_what_training_cost_is_kept(tmp_path):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.5, reselect=3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):  # steps 1 and 4 are probes; in step 0 nothing was selected yet
        model(**make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    spent = json.loads((tmp_path / "adapter_config.json").read_text())["spent"]
    assert spent["steps"] == 6 and 3.0 < spent["full_steps"] <= 4.5


class Twin(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def test_hooks_on_a_wrapped_module_fire_once():
    calls = []

    def note(name):
        return lambda *args: calls.append(name)

    base = Twin()
    base.inner.register_forward_hook(note("before wrapping"))
    base.inner.register_forward_pre_hook(note("before wrapping, pre"))
    base.inner.register_full_backward_hook(note("before wrapping, backward"))
    model = get_peft_model(base, GreenTrainerConfig())
    inner = model.get_base_model().inner
    assert isinstance(inner, GreenTrainerLayer)
    inner.register_forward_hook(note("after wrapping"))
    inner.register_full_backward_hook(note("after wrapping, backward"))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(calls) == len(set(calls)) == 5


SAVED = Path(__file__).parent / "saved_in_format_1"


@pytest.mark.parametrize("config_cls", [GreenTrainerConfig, PeftConfig])
def test_a_delta_that_was_saved_in_the_first_format_is_what_it_was(config_cls):
    """`saved_in_format_1` was written when the config said `budget` and `low_rank=2`, and with it what the model gave then."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        config = config_cls.from_pretrained(SAVED)
        model = PeftModel.from_pretrained(make_model("llama"), SAVED)
    assert (config.unit, config.low_rank, config.r) == ("flops", "also", 2)
    # peft itself says of the field that it does not know that the file is of a higher version.
    assert any("budget" in str(warning.message) for warning in given) == (config_cls is PeftConfig)
    expected = load_file(SAVED / "expected.safetensors")["logits"]
    assert torch.equal(outputs(model, "llama"), expected)
    assert model.peft_config["default"].format_version == 2


@pytest.mark.parametrize(
    "saved, expected",
    [
        ({"budget": "seconds", "low_rank": 0}, {"unit": "seconds", "low_rank": False}),
        ({"budget": "flops", "low_rank": "only", "r": 4}, {"unit": "flops", "low_rank": "only", "r": 4}),
        ({"budget": "flops", "low_rank": 4, "r": 8}, {"unit": "flops", "low_rank": "also", "r": 4}),
    ],
    ids=str,
)
def test_configs_of_the_first_format(saved, expected, tmp_path):
    text = json.dumps({"peft_type": "GREENTRAINER", "format_version": 1, **saved})
    (tmp_path / "adapter_config.json").write_text(text)
    config = GreenTrainerConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected
