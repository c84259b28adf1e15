"""Number formats: half-precision and quantized bases, autocast, and values that are created on the meta device."""

import copy
import warnings
from functools import partial

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

from peft_greentrainer import GreenTrainerConfig, flop_counter, profile
from peft_greentrainer.adapter.values import candidates, set_selection, set_values


FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def values_of(model):
    return [value for name, value in model.named_parameters() if "greentrainer_values" in name]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_every_format_is_trained_saved_and_loaded(dtype, autocast_adapter_dtype, autocast, tmp_path):
    base = make_model("llama").to(dtype)
    model = get_peft_model(
        copy.deepcopy(base), GreenTrainerConfig(rho=0.6), autocast_adapter_dtype=autocast_adapter_dtype
    )
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        tensors = train_a_little(model, "llama", make_optimizer=partial(torch.optim.SGD, lr=0.1))
        after = outputs(model, "llama")
        assert torch.isfinite(after).all()
        assert not torch.equal(after, outputs(base, "llama"))
        assert len(values_of(model)) == len(tensors)
        expected = torch.float32 if autocast_adapter_dtype else dtype
        assert {value.dtype for value in values_of(model)} == {expected}
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                copy.deepcopy(base),
                tmp_path,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            assert {value.dtype for value in values_of(loaded)} == {expected}
            assert torch.equal(outputs(loaded, "llama"), after)
        merged = loaded.merge_and_unload()
        assert torch.equal(outputs(merged, "llama"), after)
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "bert", "mamba"])
@pytest.mark.parametrize("native", [False, True])
def test_every_selected_tensor_moves_on_a_half_precision_base_at_a_small_rate(dtype, kind, native):
    base = make_model(kind).to(dtype)
    if native:  # where peft does not upcast
        base.add_adapter(GreenTrainerConfig())
        adapter = base.active_adapters()[0]
    else:
        model, adapter = get_peft_model(base, GreenTrainerConfig()), "default"
        base = model.get_base_model()
    tensors = sorted(candidates(base, base.peft_config[adapter]))
    set_values(base, adapter, tensors)
    set_selection(base, adapter, tensors)
    before = {name: p.detach().clone() for name, p in base.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    for step in range(3):
        base(**make_batch(kind, seed=step)).loss.backward()
        without_gradient = {name for name, p in base.named_parameters() if p.requires_grad and not p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == len(tensors)
    still = {name for name, p in base.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert still <= without_gradient and len(still) <= len(tensors) // 10


class Allocations(TorchDispatchMode):
    """The sizes of the tensors that operations make on the CPU."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(output):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.untyped_storage().data_ptr() not in given:
                self.numels.append(t.numel())
        return output


def test_low_cpu_mem_usage_allocates_no_weight_twice(tmp_path):
    base = make_model("llama")
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(), low_cpu_mem_usage=True)
    assert {value.device.type for value in values_of(model)} == {"meta"}
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig())
    train_a_little(model, "llama", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
    model.save_pretrained(tmp_path)
    weights = [96 * 32, 64 * 32]
    for low_cpu_mem_usage, times in ((False, 1), (True, 0)):  # beside what the file holds
        copied = copy.deepcopy(base)
        with Allocations() as allocations:
            loaded = PeftModel.from_pretrained(copied, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert sorted(n for n in allocations.numels if n > 8) == sorted(times * weights)
        assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))


def test_a_base_on_the_meta_device_can_be_wrapped():
    with torch.device("meta"):
        base = make_model("llama")
    model = get_peft_model(base, GreenTrainerConfig())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_an_offloaded_base_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    base = make_model("llama")
    accelerate.cpu_offload(base, execution_device="cpu")
    with pytest.raises(ValueError, match="model.embed_tokens are offloaded.*device_map"):
        get_peft_model(base, GreenTrainerConfig())


def test_device_map(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    model = get_peft_model(base, GreenTrainerConfig())
    train_a_little(model, "llama")
    model.save_pretrained(tmp_path / "delta")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(base, tmp_path / "delta", device_map={"": "cpu"})
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))


QUANTIZED = {
    "bitsandbytes, 4 bit": ("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes, 8 bit": ("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao": ("torchao.quantization", lambda torchao: TorchAoConfig(torchao.Int8WeightOnlyConfig())),
}


@pytest.fixture(params=QUANTIZED)
def quantized(request, tmp_path):
    library, config = QUANTIZED[request.param]
    config = config(pytest.importorskip(library))
    make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    def load():
        return LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config).train()

    return load


def test_quantized_tensors_are_no_candidates_and_cost_their_activation_gradients(quantized):
    base, batch = quantized(), make_batch("llama")
    graph = profile(base, batch)
    plain = profile(make_model("llama", hidden_size=64, intermediate_size=128), batch)
    assert not any("_proj" in name for name in graph.tensors)
    for tensors in (["model.embed_tokens.weight"], ["lm_head.weight"], ["model.layers.1.input_layernorm.weight"]):
        assert graph.flops(tensors) == plain.flops(tensors)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in tensors)
        with flop_counter() as counter:
            base(**batch).loss.backward()
        assert counter.get_total_flops() == graph.flops(tensors)


def test_what_is_left_to_train_of_a_quantized_model_is_said_trained_and_saved(quantized, tmp_path):
    with pytest.warns(
        UserWarning, match=r"21 of 30 tensors .* quantized.*Left to train: .*model.norm.weight, lm_head"
    ):
        model = get_peft_model(quantized(), GreenTrainerConfig(rho=0.8))
    Loop(model).run(4)
    assert 0 < model.base_model.selection.ratio <= 0.8
    model.save_pretrained(tmp_path / "delta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(quantized(), tmp_path / "delta")
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))
    assert torch.equal(outputs(loaded.merge_and_unload(), "llama"), outputs(model, "llama"))
