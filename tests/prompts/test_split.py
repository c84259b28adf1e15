"""A split step against the plain forward pass, in which prompt rows are detached: losses, logits, and every gradient."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_greentrainer.prompts.layout import IGNORED
from peft_greentrainer.prompts.split import SplitBackbone


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LINEAR = {
    f"linear_{name}": value for name, value in {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 8}.items()
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 5},  # shorter than the prompts
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": 4},
    "qwen3": SMALL | {"head_dim": 8},
    "olmo2": SMALL,
    "phi": SMALL,
    "mixtral": SMALL | {"num_local_experts": 4},
    "gpt2": OF_GPT2 | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": SMALL | {"n_layer": 3, "n_head": 4},
    "gpt_neox": SMALL,
    "falcon": SMALL,
    "qwen3_next": SMALL
    | LINEAR
    | EXPERTS
    | {"head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
ROWS = [(9, 5), (6, 4), (4, 8), (7, 3)]  # tokens of prompts and answers


def make_model(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)  # or nothing reads the prompt
    return model


def make_batch(padded="right", seed=0):
    ids = torch.randint(3, 96, (len(ROWS), 14), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(ROWS):
        start = 0 if padded == "right" else 14 - prompt - answer
        mask[row, start : start + prompt + answer] = 1
        labels[row, start + prompt : start + prompt + answer] = ids[row, start + prompt : start + prompt + answer]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def prompt_rows(batch):
    """(B, T) bool, by a loop: the last token before the first label is read, and so none of the prompt's."""
    rows = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, labels in enumerate(batch["labels"].tolist()):
        rows[row, : next(i for i, label in enumerate(labels) if label != IGNORED) - 1] = True
    return rows


class Detached(TorchFunctionMode):
    """Detaches the prompt's rows of whatever a linear module gives: keys and values, with all that they come from."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return detached(out, self.rows) if func is torch.nn.functional.linear else out


def detached(value, rows):
    if isinstance(value, torch.Tensor) and value.requires_grad and value.shape[:2] == rows.shape:
        return torch.where(rows.view(*rows.shape, *[1] * (value.dim() - 2)), value.detach(), value)
    return value


def reference(model, batch, prompt_gradient):
    """The plain pass whose blocks are given the prompt's rows without a gradient."""
    rows = prompt_rows(batch)

    def before(block, args, kwargs):
        return tuple(detached(a, rows) for a in args), {name: detached(a, rows) for name, a in kwargs.items()}

    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True)
        for module in model.get_decoder().modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    if prompt_gradient == "none":
        with Detached(rows):
            output = model(**batch)
    else:
        output = model(**batch)
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    return output


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found, expected, tolerance=1e-5):
    largest = max(grad.abs().max() for grad in expected.values())
    for name in found.keys() | expected.keys():
        zero = torch.zeros(())
        off = (found.get(name, zero) - expected.get(name, zero)).abs().max()
        assert off <= tolerance * largest, name


def check(kind, batch, prompt_gradient):
    plain = make_model(kind)
    model = copy.deepcopy(plain)
    expected = reference(plain, batch, prompt_gradient)
    with SplitBackbone(model, prompt_gradient) as split:
        found = model(**batch)
        found.loss.backward()
    assert split.why_not is None and split.splits == 1
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert found.logits.shape == expected.logits.shape
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[tokens], expected.logits[tokens], rtol=1e-4, atol=1e-4)
    # Its recurrence is cut into chunks elsewhere.
    check_gradients(gradients(model), gradients(plain), 1e-4 if kind == "qwen3_next" else 1e-5)


@pytest.mark.parametrize("padded", ["right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_hop_is_exact(kind, padded):
    check(kind, make_batch(padded), "keys")


@pytest.mark.parametrize("padded", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "opt", "gpt_neox", "phi"])
def test_no_gradient_in_the_prompt_is_exact(kind, padded):
    check(kind, make_batch(padded), "none")


@pytest.mark.parametrize("kind", MODELS)
def test_the_models_read_their_prompts(kind):
    model, batch = make_model(kind), make_batch()
    losses = []
    for ids in (
        batch["input_ids"],
        batch["input_ids"].where(~prompt_rows(batch), batch["input_ids"].flip(0) % 90 + 3),
    ):
        losses.append(model(**batch | {"input_ids": ids}).loss.item())
    assert abs(losses[0] - losses[1]) > 100 * 1e-5 * losses[0]


@pytest.mark.parametrize("prompt_gradient", ["keys", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "falcon", "qwen3_next"])
def test_gradient_checkpointing_changes_no_gradient(kind, prompt_gradient):
    batch = make_batch()
    plain, model = make_model(kind), make_model(kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with SplitBackbone(plain, prompt_gradient):
        plain(**batch).loss.backward()
    with SplitBackbone(model, prompt_gradient) as split:
        model(**batch, use_cache=False).loss.backward()
    assert split.splits == 1
    check_gradients(gradients(model), gradients(plain))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())  # as it was


@pytest.mark.parametrize("prompt_gradient", ["keys", "none"])
def test_autocast_loses_no_gradient(prompt_gradient):
    batch = make_batch()
    plain, model = make_model("llama"), make_model("llama")
    with SplitBackbone(plain, prompt_gradient):
        plain(**batch).loss.backward()
    with SplitBackbone(model, prompt_gradient) as split, torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert split.splits == 1
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        similarity = torch.nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.98, name


@pytest.mark.parametrize(
    "change, why",
    [
        ({"labels": None}, "without labels"),
        ({"inputs_embeds": torch.randn(4, 14, 32), "input_ids": None}, "without input_ids"),
        ({"attention_mask": torch.ones(4, 1, 14, 14, dtype=torch.bool).tril()}, "more than two dimensions"),
        ({"token_type_ids": torch.zeros(4, 14, dtype=torch.long)}, "token_type_ids"),
        ({"output_hidden_states": True}, "output_hidden_states was asked for"),
        ({"labels": torch.full((4, 14), 5), "attention_mask": None}, "there is no prompt"),
        (make_batch("left") | {"labels": make_batch("left")["input_ids"]}, "reads the output of padding"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_known_is_run_as_it_is(change, why):
    plain = make_model("llama")
    model = copy.deepcopy(plain)
    batch = {name: value for name, value in (make_batch() | change).items() if value is not None}
    expected = plain(**batch)
    with SplitBackbone(model, "keys") as split:
        found = model(**batch)
    assert split.splits == 0 and why in split.why_not
    assert torch.equal(found.logits, expected.logits)


def test_a_model_that_does_not_go_on_from_its_cache_is_not_split():
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    batch = make_batch()
    expected = model(**batch).loss
    with SplitBackbone(model, "keys") as split:
        assert torch.equal(model(**batch).loss, expected)
    assert split.splits == 0 and "gives other outputs" in split.why_not


def test_nothing_is_split_in_evaluation_and_nothing_is_left_behind():
    model = make_model("llama")
    before = set(vars(model))
    hooks = len(model.model._forward_pre_hooks)
    with SplitBackbone(model, "keys") as split, torch.no_grad():
        model(**make_batch())
    assert split.splits == 0
    assert set(vars(model)) == before and len(model.model._forward_pre_hooks) == hooks
