"""Small random-weight models, made from configurations, each with a batch that gives a loss."""

import tokenizers
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import nn


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
KV = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

# For each kind: the class of the model, that of its configuration, and what the configuration says.
MODELS = {
    "llama": (tr.LlamaForCausalLM, tr.LlamaConfig, SIZES | KV | TOKENS),
    "qwen3": (tr.Qwen3ForCausalLM, tr.Qwen3Config, SIZES | KV | TOKENS | {"head_dim": 8}),
    "gemma3": (
        tr.Gemma3ForCausalLM,
        tr.Gemma3TextConfig,
        SIZES
        | KV
        | TOKENS
        | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "mistral": (tr.MistralForCausalLM, tr.MistralConfig, SIZES | KV | TOKENS | {"sliding_window": 8}),
    "phi3": (tr.Phi3ForCausalLM, tr.Phi3Config, SIZES | KV | TOKENS),
    "gpt-neox": (tr.GPTNeoXForCausalLM, tr.GPTNeoXConfig, SIZES | TOKENS),
    "falcon": (tr.FalconForCausalLM, tr.FalconConfig, SIZES | TOKENS),
    "gpt2": (
        tr.GPT2LMHeadModel,
        tr.GPT2Config,
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0} | TOKENS,
    ),
    "opt": (
        tr.OPTForCausalLM,
        tr.OPTConfig,
        SIZES | TOKENS | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
    ),
    "bloom": (tr.BloomForCausalLM, tr.BloomConfig, {"hidden_size": 32, "n_layer": 3, "n_head": 4} | TOKENS),
    "mixture": (
        tr.MixtralForCausalLM,
        tr.MixtralConfig,
        SIZES | KV | TOKENS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        tr.Qwen3MoeForCausalLM,
        tr.Qwen3MoeConfig,
        SIZES | KV | TOKENS | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16},
    ),
    "mamba2": (
        tr.Mamba2ForCausalLM,
        tr.Mamba2Config,
        {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "num_hidden_layers": 2}
        | TOKENS
        | {"chunk_size": 8},
    ),
    "mamba": (
        tr.MambaForCausalLM,
        tr.MambaConfig,
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4} | TOKENS,
    ),
    "qwen3-next": (
        tr.Qwen3NextForCausalLM,
        tr.Qwen3NextConfig,
        SIZES
        | KV
        | TOKENS
        | EXPERTS
        | {"num_hidden_layers": 4, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "jamba": (
        tr.JambaForCausalLM,
        tr.JambaConfig,
        SIZES
        | KV
        | TOKENS
        | {"num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "bert": (tr.BertForMaskedLM, tr.BertConfig, SIZES | NO_DROPOUT | {"vocab_size": 96}),
    "modernbert": (tr.ModernBertForMaskedLM, tr.ModernBertConfig, SIZES | TOKENS | {"local_attention": 8}),
    "deberta": (
        tr.DebertaV2ForMaskedLM,
        tr.DebertaV2Config,
        SIZES | {"vocab_size": 96, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "t5": (tr.T5ForConditionalGeneration, tr.T5Config, T5 | {"vocab_size": 96}),
    # With dropout there is no fused attention on the CPU.
    "t5-fused": (tr.T5ForConditionalGeneration, tr.T5Config, T5 | {"vocab_size": 96, "dropout_rate": 0.0}),
    "bart": (tr.BartForConditionalGeneration, tr.BartConfig, BART | TOKENS | {"max_position_embeddings": 64}),
    "whisper": (
        tr.WhisperForConditionalGeneration,
        tr.WhisperConfig,
        BART | TOKENS | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64},
    ),
    # It masks what its convolutions give, by their class and stride.
    "parakeet": (
        tr.ParakeetForCTC,
        tr.ParakeetCTCConfig,
        {
            "vocab_size": 96,
            "pad_token_id": 0,
            "encoder_config": SIZES
            | {"num_hidden_layers": 2, "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 5}
            | dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0),
        },
    ),
    # It keeps the state of a recurrence on modules, some of which are leaves.
    "recurrent-gemma": (
        tr.RecurrentGemmaForCausalLM,
        tr.RecurrentGemmaConfig,
        SIZES
        | TOKENS
        | {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "vit": (tr.ViTForImageClassification, tr.ViTConfig, VISION),
    "convnext": (
        tr.ConvNextForImageClassification,
        tr.ConvNextConfig,
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "image_size": 8},
    ),
    "clip": (
        tr.CLIPModel,
        tr.CLIPConfig,
        {
            "text_config": SIZES | TOKENS | {"max_position_embeddings": 32},
            "vision_config": VISION,
            "projection_dim": 16,
        },
    ),
}
# Models with the head of a task, and the task that peft knows them by.
BERT = SIZES | NO_DROPOUT | {"vocab_size": 96}
TASKS = {
    "bert-sequences": (tr.BertForSequenceClassification, tr.BertConfig, BERT, "SEQ_CLS"),
    "llama-sequences": (tr.LlamaForSequenceClassification, tr.LlamaConfig, SIZES | KV | TOKENS, "SEQ_CLS"),
    "bert-tokens": (tr.BertForTokenClassification, tr.BertConfig, BERT, "TOKEN_CLS"),
    "bert-answers": (tr.BertForQuestionAnswering, tr.BertConfig, BERT, "QUESTION_ANS"),
    "bert-features": (tr.BertModel, tr.BertConfig, BERT, "FEATURE_EXTRACTION"),
}
# The same under other names, with what is different.
VARIANTS = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "mixture-fallback": ("mixture", {"experts_implementation": "eager"}),
}


class ConvNet(nn.Module):
    """A plain module with no config and no loss of its own: convolutions, a norm, a linear that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, images, labels=None):
        hidden = self.second(torch.relu(self.norm(self.first(images))))
        hidden = self.up(torch.relu(hidden)).mean(dim=(2, 3))
        logits = self.head(self.mix(torch.relu(self.mix(hidden))))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Experts(nn.Module):
    """Experts as separate modules, side by side in every layer."""

    def __init__(self, layers=3, experts=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(16),
                    "gate": nn.Linear(16, experts),
                    "experts": nn.ModuleList(
                        nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(experts)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, hidden, labels=None):
        for layer in self.layers:
            normed = layer["norm"](hidden)
            weights = layer["gate"](normed).softmax(-1).unbind(-1)
            hidden = hidden + sum(w[:, None] * expert(normed) for w, expert in zip(weights, layer["experts"]))
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels)}


def lora(**changes):
    """Llama with LoRA layers, whose factors are candidates beside the whole tensors."""
    return get_peft_model(
        make_model("llama", **changes), LoraConfig(r=4, target_modules="all-linear")
    ).base_model.model


PLAIN = {"convnet": ConvNet, "experts": Experts, "lora": lora}


def make_model(kind, **changes):
    torch.manual_seed(0)
    if kind in PLAIN:
        return PLAIN[kind](**changes)
    kind, variant = VARIANTS.get(kind, (kind, {}))
    model_cls, config_cls, fields = TASKS[kind][:3] if kind in TASKS else MODELS[kind]
    return model_cls(config_cls(**fields | variant | changes))


def llama(**changes):
    return make_model("llama", **changes)


def make_batch(kind, rows=4, tokens=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "experts":
        return {"hidden": torch.randn(rows, 16, generator=generator), "labels": torch.arange(rows) % 5}
    if kind in ("convnet", "convnext", "vit", "clip"):
        images = torch.randn(rows, 3, 8, 8, generator=generator)
        if kind == "convnet":
            return {"images": images, "labels": torch.arange(rows) % 5}
        if kind != "clip":
            return {"pixel_values": images, "labels": torch.arange(rows) % 2}
    if kind == "parakeet":
        mask = torch.ones(rows, 64, dtype=torch.long)
        mask[0, -24:] = 0
        features = torch.randn(rows, 64, 16, generator=generator)
        labels = torch.randint(3, 96, (rows, 4), generator=generator)
        return {"input_features": features, "attention_mask": mask, "labels": labels}
    ids = torch.randint(3, 96, (rows, tokens), generator=generator)
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 32, generator=generator), "labels": ids}
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if kind == "bert-features":
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "bert-answers":
        positions = torch.arange(rows) % 5
        return {"input_ids": ids, "attention_mask": mask, "start_positions": positions, "end_positions": positions + 1}
    if kind in ("bert-sequences", "llama-sequences"):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}
    if kind == "bert-tokens":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids % 2}
    if kind == "clip":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": images, "return_loss": True}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def make_tokenizer():
    """Words w3 to w95 and three special tokens, as the vocabulary of the models."""
    words = Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 96)}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tr.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def make_text(rows, words=12, shift=0):
    """Sentences of the words of the tokenizer."""
    return [" ".join(f"w{(7 * (row + shift) + word) % 90 + 4}" for word in range(words)) for row in range(rows)]
