"""Small random-weight models, made from configurations, each with a batch that gives a loss."""

import torch
import transformers as tr
from torch import nn


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


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


def llama(**changes):
    return tr.LlamaForCausalLM(tr.LlamaConfig(**{**SIZES, **TOKENS, "num_key_value_heads": 2, **changes}))


def mixture(**changes):
    return tr.MixtralForCausalLM(
        tr.MixtralConfig(
            **{
                **SIZES,
                **TOKENS,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                **changes,
            }
        )
    )


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-eager": lambda: llama(attn_implementation="eager"),
    "gpt2": lambda: tr.GPT2LMHeadModel(
        tr.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64, resid_pdrop=0.0, **TOKENS)
    ),
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=96,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            dropout=0.0,
            **TOKENS,
        )
    ),
    "bloom": lambda: tr.BloomForCausalLM(tr.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=96, **TOKENS)),
    "t5": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            vocab_size=96,
            decoder_start_token_id=0,
        )
    ),
    "t5-fused": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            vocab_size=96,
            decoder_start_token_id=0,
            dropout_rate=0.0,  # with dropout there is no fused attention on the CPU
        )
    ),
    "bert": lambda: tr.BertForMaskedLM(
        tr.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "mixture": mixture,
    "mixture-fallback": lambda: mixture(experts_implementation="eager"),
    "mamba2": lambda: tr.Mamba2ForCausalLM(
        tr.Mamba2Config(
            hidden_size=32,
            num_heads=8,
            head_dim=8,
            state_size=16,
            n_groups=2,
            num_hidden_layers=2,
            vocab_size=96,
            chunk_size=8,
            **TOKENS,
        )
    ),
    "convnet": ConvNet,
}


def make_model(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


def make_batch(kind, rows=4, tokens=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "convnet":
        return {
            "images": torch.randn(rows, 3, 8, 8, generator=generator),
            "labels": torch.arange(rows) % 5,
        }
    ids = torch.randint(3, 96, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}
