"""Embeddings and heads: what the model gives as such, how they are saved, and a resized vocabulary."""

import pytest
import torch
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_greentrainer import GreenTrainerConfig


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
