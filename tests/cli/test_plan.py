"""Plans on the meta device: the paper's figures, the console script, and what it prints."""

import json
import resource

import pytest
import torch
import transformers as tr
from helpers.models import LLAMA_70B, MODELS, make_batch, make_model

from peft_greentrainer import GreenTrainerConfig, profile, select
from peft_greentrainer.adapter.values import candidates
from peft_greentrainer.cli.main import main


def on_meta(model_cls, config):
    with torch.device("meta"):
        return model_cls(config)


def ids(rows, tokens):
    return torch.zeros(rows, tokens, dtype=torch.long, device="meta")


OPT = {"num_hidden_layers": 32, "num_attention_heads": 32}
PAPER = {
    # PFLOPs of full fine-tuning on SciTLDR in the paper's main table, which counts a multiply-add once.
    "opt-2.7b": (41.8, tr.OPTForCausalLM, tr.OPTConfig(hidden_size=2560, ffn_dim=10240, **OPT), 512),
    "opt-6.7b": (103.9, tr.OPTForCausalLM, tr.OPTConfig(hidden_size=4096, ffn_dim=16384, **OPT), 512),
    "bloomz-3b": (
        47.2,
        tr.BloomForCausalLM,
        tr.BloomConfig(hidden_size=2560, n_layer=30, n_head=32, vocab_size=250880),
        512,
    ),
    # 21.7 in the paper, whose code takes the length of the output for the keys and values of the cross-attention.
    "flan-t5-3b": (
        24.4,
        tr.T5ForConditionalGeneration,
        tr.T5Config(
            d_model=2048,
            d_ff=5120,
            num_layers=24,
            num_heads=32,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
        64,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_cost_of_full_fine_tuning(name):
    petaflops, model_cls, config, target_len = PAPER[name]
    batch = {"input_ids": ids(4, 512), "labels": ids(4, target_len)}
    graph = profile(on_meta(model_cls, config), batch)
    steps = 498 * 5
    assert graph.full_flops / 2 * steps / 1e15 == pytest.approx(petaflops, rel=0.003)


def test_seventy_billion_weights_fit_a_laptop():
    model = on_meta(tr.LlamaForCausalLM, tr.LlamaConfig(**LLAMA_70B))
    assert sum(p.numel() for p in model.parameters()) > 70e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = profile(model, {"input_ids": ids(4, 512), "labels": ids(4, 512)})
    selection = select(graph, dict.fromkeys(graph.tensors, 1.0), rho=0.5)
    assert len(graph.tensors) == 723 and 0.499 < selection.ratio <= 0.5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("clip", "whisper", "parakeet")])
def test_the_script_plans_every_family_without_weights(kind, tmp_path, capsys):
    model = make_model(kind, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    main(["plan", str(tmp_path / "config.json"), "--rho", "0.6", "--batch-size", "4", "--seq-len", "16", "--json"])
    plan = json.loads(capsys.readouterr().out)

    batch = make_batch(kind)
    batch.pop("attention_mask", None)
    graph = profile(model, batch, candidates=candidates(model, GreenTrainerConfig()))
    assert plan["forward_flops"] == graph.forward_flops
    assert plan["forward_flops"] + plan["activation_flops"] + plan["weight_flops"] == graph.full_flops
    assert plan["floor"] == graph.floor
    assert sum(group["tensors"] for group in plan["kinds"].values()) == plan["candidates"]
    assert sum(group["weights"] for group in plan["layers"].values()) <= plan["weights"]
    for rho, budget in plan["budgets"].items():
        assert (budget is None) == (float(rho) < plan["floor"])
        assert budget is None or plan["floor"] <= budget["ratio"] <= float(rho)


def saved_llama(folder, **changes):
    model = make_model("llama", **changes)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    return model


def test_the_script_prints_a_plan(tmp_path, capsys):
    model = saved_llama(tmp_path)
    main(["plan", str(tmp_path), "--rho", "0.5", "--seq-len", "32"])
    text = capsys.readouterr().out
    weights = sum(p.numel() for p in model.parameters())
    assert f"{weights / 1e6:,.1f} million weights in 30 tensors, 30 of them candidates" in text
    for expected in (
        "floor 0.",
        "activation gradients",
        "model.layers.*.mlp.up_proj.weight",
        "  model.layers.2 ",
        "LoRA",
    ):
        assert expected in text
    assert [line.split()[0] for line in text.split("what rho buys")[1].splitlines()[1:7]] == [
        f"0.{tenth}" for tenth in (4, 5, 6, 7, 8, 9)
    ]


def test_memory_is_that_of_what_is_trained(tmp_path, capsys):
    model = saved_llama(tmp_path)
    weights = sum(p.numel() for p in model.parameters())
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        main(["plan", str(tmp_path), "--rho", "0.7", "--dtype", dtype, "--json"])
        plan = json.loads(capsys.readouterr().out)
        trained = plan["budgets"]["0.7"]["weights"]
        assert plan["memory"]["full"] == {
            "weights": weights * item,
            "gradients": weights * item,
            "optimizer": 2 * weights * item,
        }
        assert plan["memory"]["rho"] == {
            "weights": weights * item + 4 * trained,
            "gradients": 4 * trained,
            "optimizer": 8 * trained,
        }
        assert plan["memory"]["LoRA"]["gradients"] < plan["memory"]["rho"]["gradients"]
        assert 0.6 < plan["lora_ratio"] < 1.1


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["--include", "q_proj", "v_proj"], 6),
        (["--include", r".*\.1\.mlp\..*"], 3),
        (["--exclude", "lm_head"], 29),
        (["--include", "all-linear"], 21),
    ],
)
def test_patterns_are_those_of_the_config(patterns, expected, tmp_path, capsys):
    saved_llama(tmp_path)
    main(["plan", str(tmp_path), "--rho", "0.9", "--json", *patterns])
    assert json.loads(capsys.readouterr().out)["candidates"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rho", "1.5"], r"rho must be in \(0, 1\]"),
        (["--include", "no_such"], "matches no module"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    saved_llama(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["plan", str(tmp_path), *arguments])


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="peft-greentrainer: .*nothing"):
        main(["plan", str(tmp_path / "nothing")])
