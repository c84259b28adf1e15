"""The cost graph agrees exactly with what FlopCounterMode counts, on every family and any subset."""

import random

import numpy as np
import pytest
import torch
from helpers.models import MODELS, PLAIN, VARIANTS, make_batch, make_model
from torch import nn

from peft_greentrainer import profile, select
from peft_greentrainer.measuring.formulas import flop_counter, missing_formulas
from peft_greentrainer.measuring.importance import importance


FAMILIES = [*MODELS, *VARIANTS, *PLAIN]
VISION = ["vit", "convnext", "clip"]
WITHOUT_CONFIG = ["convnet", "experts"]


def counted(model, batch, trained):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = None
    with flop_counter() as counter:
        output = model(**batch)
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    return counter.get_total_flops()


def assert_exact(model, batch, subsets, graph=None):
    graph = graph or profile(model, batch)
    choose = random.Random(0)
    for case in range(subsets):
        at_most = len(graph.tensors) if case % 2 else min(6, len(graph.tensors))
        subset = choose.sample(graph.tensors, choose.randint(1, at_most))
        assert graph.flops(subset) == counted(model, batch, subset), subset
    assert graph.full_flops == counted(model, batch, dict(model.named_parameters()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_flops_of_random_subsets_are_exact(kind):
    assert_exact(make_model(kind), make_batch(kind), subsets=20)


@pytest.mark.parametrize(
    "changes",
    [{"attn_implementation": "eager"}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}],
    ids=["eager", "tied", "untied"],
)
@pytest.mark.parametrize("kind", [kind for kind in [*MODELS, "lora"] if kind not in VISION])
def test_exact_whatever_the_configuration_says(kind, changes):
    assert_exact(make_model(kind, **changes), make_batch(kind), subsets=4)


@pytest.mark.parametrize(
    "kind", [kind for kind in [*MODELS, "lora"] if "attention_mask" in make_batch(kind) and kind != "parakeet"]
)
def test_exact_without_an_attention_mask(kind):
    batch = make_batch(kind)
    del batch["attention_mask"]
    assert_exact(make_model(kind), batch, subsets=4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_in_bfloat16(kind):
    batch = make_batch(kind)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            batch[name] = value.bfloat16()
    assert_exact(make_model(kind).bfloat16(), batch, subsets=4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_under_autocast(kind):
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(make_model(kind), make_batch(kind), subsets=4)


CHECKPOINTED = [
    "llama",
    "llama-eager",
    "gpt-neox",
    "bart",
    "t5",
    "t5-fused",
    "bert",
    "mamba2",
    "jamba",
    "mixture",
    "vit",
]


@pytest.mark.parametrize("how", ["non-reentrant", "non-reentrant with hooks", "reentrant with hooks"])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_exact_with_gradient_checkpointing(kind, how):
    model = make_model(kind).train()
    model.gradient_checkpointing_enable({"use_reentrant": how.startswith("reentrant")})
    # transformers, peft and trl make the embedding's output require grad; reentrant checkpointing needs it.
    if how.endswith("with hooks"):
        model.enable_input_require_grads()
    else:
        model.disable_input_require_grads()
    if (kind, how) == ("t5-fused", "reentrant with hooks"):
        # Which kernel a recomputed attention runs is not noticed.
        graph = profile(model, make_batch(kind))
        for subset in (graph.tensors[:5], graph.tensors[20:25], graph.tensors[::7]):
            assert graph.flops(subset) == pytest.approx(counted(model, make_batch(kind), subset), rel=0.01)
    else:
        assert_exact(model, make_batch(kind), subsets=8)


def test_an_activation_that_requires_grad_raises_the_floor():
    model, batch = make_model("llama"), make_batch("llama")
    floor = profile(model, batch).floor
    model.enable_input_require_grads()
    graph = profile(model, batch)
    assert floor < 0.5 < graph.floor
    assert graph.flops([graph.tensors[-1]]) == counted(model, batch, [graph.tensors[-1]])
    assert graph.forced_cost == graph.flops(["lm_head.weight"]) - graph.forward_flops - 2 * 4 * 16 * 32 * 96
    with pytest.raises(ValueError, match="under the floor.*disable_input_require_grads"):
        select(graph, dict.fromkeys(graph.tensors, 1.0), rho=0.5)


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_attention_and_experts_are_not_free(kind):
    model, batch = make_model(kind), make_batch(kind)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as plain:
        model(**batch)
    assert profile(model, batch).forward_flops > plain.get_total_flops()


def test_tensors_are_in_execution_order():
    graph = profile(make_model("llama-tied"), make_batch("llama"))
    names = [n.replace("model.layers.", "") for n in graph.tensors]
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "model.norm.weight"
    layers = [int(n[0]) for n in names[1:-1]]
    assert layers == sorted(layers)
    assert names.index("1.input_layernorm.weight") < names.index("1.self_attn.q_proj.weight")
    assert names.index("1.self_attn.o_proj.weight") < names.index("1.post_attention_layernorm.weight")


def test_floor_is_the_cheapest_single_tensor():
    graph = profile(make_model("gpt2"), make_batch("gpt2"))
    assert graph.floor == min(graph.ratio([name]) for name in graph.tensors)
    assert graph.flops([]) == graph.forward_flops
    assert graph.ratio(graph.tensors) == 1


def test_profile_leaves_a_state_in_plain_attributes_as_it_was():
    model, batch = make_model("recurrent-gemma"), make_batch("recurrent-gemma")
    holders = [module for module in model.modules() if "recurrent_states" in vars(module)]
    profile(model, batch)
    assert holders and all(module.recurrent_states is None for module in holders)
    with torch.no_grad():
        model(**batch)
    states = [module.recurrent_states for module in holders]
    profile(model, batch)
    assert all(module.recurrent_states is state for module, state in zip(holders, states))


def test_profile_leaves_the_model_as_it_was():
    model, batch = make_model("convnet"), make_batch("convnet")
    model.norm = nn.BatchNorm2d(8)
    model.mix.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    profile(model, batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"mix.weight"}
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_candidates_do_not_change_what_full_fine_tuning_costs():
    model, batch = make_model("llama"), make_batch("llama")
    graph = profile(model, batch)
    last = [name for name in graph.tensors if ".layers.2." in name]
    fewer = profile(model, batch, candidates=last)
    assert set(fewer.tensors) == set(last)
    assert fewer.full_flops == graph.full_flops
    assert fewer.flops(last[:3]) == graph.flops(last[:3])


def test_meta_device_gives_the_same_graph():
    model, batch = make_model("llama-eager"), make_batch("llama-eager")
    del batch["attention_mask"]  # transformers looks at its values
    graph = profile(model, batch)
    on_meta = profile(model.to("meta"), {name: value.to("meta") for name, value in batch.items()})
    assert on_meta.tensors == graph.tensors
    assert on_meta.full_flops == graph.full_flops
    assert on_meta.flops(graph.tensors[5:9]) == graph.flops(graph.tensors[5:9])


def test_loss_fn_and_positional_batches():
    model, batch = make_model("convnet"), make_batch("convnet")
    graph = profile(model, batch)

    def loss_fn(output, batch):
        return nn.functional.cross_entropy(output, torch.zeros(4, dtype=torch.long))

    for inputs in (batch["images"], (batch["images"],), {"images": batch["images"]}):
        other = profile(model, inputs, loss_fn=loss_fn)
        assert (other.tensors, other.full_flops) == (graph.tensors, graph.full_flops)


def test_a_matmul_without_a_formula_is_named():
    @torch.library.custom_op("greentrainer_test::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    product.register_autograd(
        lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return product(self.inner(x), self.weight)

    with pytest.warns(UserWarning, match="greentrainer_test::product looks like a matrix product"):
        profile(Net(), torch.randn(3, 4), loss_fn=lambda output, batch: output.sum())


def test_formulas_count_two_flops_per_multiply_add():
    x, w = torch.randn(6, 8), torch.randn(3, 8, 16)
    with flop_counter() as counter:
        torch.nn.functional.grouped_mm(x.bfloat16(), w.bfloat16(), offs=torch.tensor([1, 3, 6], dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 6 * 8 * 16
    with flop_counter() as counter:
        torch.zeros(6, 16).addmm_(x, w[0])
        torch.mv(x, w[0, :, 0])
    assert counter.get_total_flops() == 2 * 6 * 8 * 16 + 2 * 6 * 8
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in missing_formulas()


@pytest.mark.parametrize("names", [["no.such.weight"], ["lm_head.weight", "model.rotary_emb.inv_freq"]])
def test_unknown_tensors_are_refused_by_name(names):
    graph = profile(make_model("llama"), make_batch("llama"))
    with pytest.raises(ValueError, match=names[-1]):
        graph.flops(names)


def test_a_batch_without_a_loss_is_refused():
    batch = make_batch("llama")
    del batch["labels"]
    with pytest.raises(ValueError, match="gives no loss.*labels.*loss_fn"):
        profile(make_model("llama"), batch)


def test_what_depends_on_a_trained_bias_is_bounded():
    graph = profile(make_model("t5-fused"), make_batch("t5"))
    choose = random.Random(1)
    dearer = 0
    for _ in range(200):
        subset = choose.sample(graph.tensors, choose.randint(1, len(graph.tensors)))
        bound = graph.forward_flops + graph.costs @ graph.bounded_needs[graph.rows(subset)].any(axis=0)
        biased = any("relative_attention_bias" in name for name in subset)
        assert bound >= graph.flops(subset) if biased else bound == graph.flops(subset)
        dearer += bound > graph.flops(subset)
    assert 0 < dearer < 200


def test_costs_of_a_graph_add_up():
    graph = profile(make_model("llama"), make_batch("llama"))
    assert graph.costs.dtype == np.int64 and graph.needs.shape == (len(graph.tensors), len(graph.costs))
    assert graph.forward_flops + graph.costs.sum() == graph.full_flops


class Product(torch.autograd.Function):
    """Makes both gradients, whoever asks."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class FrugalProduct(Product):
    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return (grad @ w if ctx.needs_input_grad[0] else None, grad.T @ x if ctx.needs_input_grad[1] else None)


@pytest.mark.parametrize("product", [Product, FrugalProduct])
def test_custom_functions_are_charged_for_what_they_run(product):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            hidden = product.apply(torch.relu(self.first(x)), self.second.weight)
            return {"loss": self.third(torch.relu(hidden)).sum()}

    model, batch = Net(), {"x": torch.randn(4, 8)}
    graph = profile(model, batch)
    for name in graph.tensors:
        assert graph.flops([name]) == counted(model, batch, [name])


def test_sparse_gradients_have_an_importance():
    dense, sparse = nn.Embedding(10, 4), nn.Embedding(10, 4, sparse=True)
    sparse.weight.data.copy_(dense.weight.data)
    for embedding in (dense, sparse):
        (embedding(torch.tensor([1, 2, 2, 7])) ** 2).sum().backward()
    for rule in ("adam", "sgd"):
        torch.testing.assert_close(
            importance(sparse.weight.grad, rule, lr=0.1), importance(dense.weight.grad, rule, lr=0.1)
        )
