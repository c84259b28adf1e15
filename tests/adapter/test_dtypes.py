"""Values stay in float32 whoever casts them: what is trained in half precision does not move at a small learning rate."""

import copy

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model, make_text, make_tokenizer
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import Trainer, TrainingArguments

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig
from peft_greentrainer.adapter.values import candidates, set_selection, set_values


TENSORS = ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
FACTORS = ["model.layers.2.mlp.up_proj.weight_low_rank", "model.layers.1.self_attn.q_proj.weight_low_rank"]


def as_trl_does(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


CASTS = {
    "what requires grad": as_trl_does,
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
}


@pytest.fixture(params=CASTS)
def cast(request):
    return CASTS[request.param]


def wrapped(base, tensors, **config):
    model = get_peft_model(base, GreenTrainerConfig(**config))
    base = model.get_base_model()
    set_values(base, "default", tensors)
    set_selection(base, "default", tensors)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def value_of(model, tensor):
    module, _, name = tensor.rpartition(".")
    return model.get_parameter(f"base_model.model.{module}.greentrainer_values.default.{name}")


def take_pass(model, kind="llama", seed=0):
    model(**make_batch(kind, seed=seed)).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_were_cast_are_the_base_tensors_again_before_the_first_step(cast, dtype):
    base = make_model("llama").to(dtype)
    model = wrapped(copy.deepcopy(base), TENSORS)
    if cast is not as_trl_does:
        cast(base)  # which rounds the base tensors themselves
    cast(model)
    values = trained(model)
    take_pass(model)
    assert len(values) == len(TENSORS) and all(trained(model)[name] is value for name, value in values.items())
    for tensor in TENSORS:
        value = value_of(model, tensor)
        assert value.dtype == value.grad.dtype == torch.float32
        assert torch.equal(value, base.get_parameter(tensor).float()), tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_a_small_rate_they_move_as_those_of_a_float32_model_do(cast, dtype):
    base = make_model("llama").to(dtype)
    model = wrapped(copy.deepcopy(base), TENSORS)
    cast(model)
    if cast is not as_trl_does:
        cast(base)
    plain = base.float()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in TENSORS)
    start = copy.deepcopy(plain.state_dict())
    for trains in (plain, model):
        optimizer = torch.optim.AdamW([p for p in trains.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        for step in range(5):
            take_pass(trains, seed=step)
            optimizer.step()
            optimizer.zero_grad()
    for tensor in TENSORS:
        moved, expected = (
            found.detach() - start[tensor] for found in (value_of(model, tensor), plain.get_parameter(tensor))
        )
        assert (moved != 0).sum() >= 0.99 * (expected != 0).sum(), tensor
        assert (moved - expected).norm() < 0.3 * expected.norm(), tensor


@pytest.mark.parametrize("low_rank", ["also", "only"])
def test_low_rank_factors_that_were_cast_are_those_that_were_drawn(cast, low_rank):
    torch.manual_seed(3)
    model = wrapped(make_model("llama").to(torch.bfloat16), FACTORS, low_rank=low_rank)
    drawn = {name: p.detach().clone() for name, p in trained(model).items()}
    cast(model)
    assert any(p.dtype != torch.float32 for p in trained(model).values())
    take_pass(model)
    assert len(drawn) == 2 * len(FACTORS)
    for name, value in trained(model).items():
        assert value.dtype == torch.float32 and torch.equal(value, drawn[name]), name


def test_a_native_adapter(cast):
    base = make_model("llama").to(torch.bfloat16)
    plain = copy.deepcopy(base)
    base.add_adapter(GreenTrainerConfig(rho=0.6))
    cast(base)
    if cast is not as_trl_does:
        cast(plain)
    take_pass(base)
    values = trained(base)
    assert values
    for name, value in values.items():
        module, _, rest = name.partition(".greentrainer_values.")
        tensor = f"{module}.{rest.partition('.')[2]}"
        assert value.dtype == torch.float32 and torch.equal(value, plain.get_parameter(tensor).float()), tensor


@pytest.mark.parametrize("kind", ["mamba", "t5", "gpt2"])
def test_weights_that_are_read_without_a_call_and_tied_ones(kind, cast):
    model = get_peft_model(make_model(kind).to(torch.bfloat16), GreenTrainerConfig(rho=1.0))
    cast(model)
    assert {p.dtype for p in trained(model).values()} <= {torch.bfloat16, torch.float16}
    take_pass(model, kind)
    late = {name for name, p in trained(model).items() if p.dtype != torch.float32}
    assert not late and not any(p.grad is None for p in trained(model).values())


def test_what_was_trained_before_is_float32_again(cast, tmp_path):
    base = make_model("llama").to(torch.bfloat16)
    model = wrapped(copy.deepcopy(base), TENSORS)
    train_a_little(model, "llama", TENSORS)
    model.save_pretrained(tmp_path)
    expected = {tensor: value_of(model, tensor).detach().clone() for tensor in TENSORS}
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    cast(loaded)
    rounding = value_of(loaded, TENSORS[0]).dtype
    take_pass(loaded)
    for tensor, value in expected.items():
        assert torch.equal(value_of(loaded, tensor), value.to(rounding).float()), tensor


def test_who_infers_in_half_precision_is_left_alone(cast, tmp_path):
    base = make_model("llama")
    model = wrapped(copy.deepcopy(base), TENSORS)
    train_a_little(model, "llama", TENSORS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.half()
    loaded(**make_batch("llama"))
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    cast(trainable)
    outputs(trainable, "llama")
    with torch.inference_mode():
        trainable(**make_batch("llama"))
    for left in (loaded, trainable):
        assert not any(value_of(left, tensor).dtype == torch.float32 for tensor in TENSORS)


def test_who_wants_half_precision_values_has_them(cast):
    model = get_peft_model(make_model("llama").to(torch.bfloat16), GreenTrainerConfig(), autocast_adapter_dtype=False)
    cast(model)
    take_pass(model)
    assert not any(p.dtype == torch.float32 for p in trained(model).values())


def test_a_value_that_is_selected_later_is_float32_too():
    model = wrapped(make_model("llama").to(torch.bfloat16), TENSORS)
    base = model.get_base_model()
    set_selection(base, "default", TENSORS[:1])
    model.to(torch.bfloat16)
    take_pass(model)
    set_selection(base, "default", TENSORS)
    take_pass(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32} and len(trained(model)) == len(TENSORS)


def test_a_loop_that_selects_again(cast):
    model = get_peft_model(make_model("llama").to(torch.bfloat16), GreenTrainerConfig(rho=0.6, reselect=2))
    cast(model)
    loop = Loop(model, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)).run(6)
    assert 0 < loop.selection.ratio <= 0.6
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    take_pass(model, seed=7)
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    loop.optimizer.step()
    for name, value in trained(model).items():
        assert ((value != before[name]) | (gradients[name] == 0)).float().mean() > 0.99, name


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model(in_place):
    torch._dynamo.reset()
    base = make_model("llama").to(torch.bfloat16)
    model = wrapped(copy.deepcopy(base), TENSORS)
    as_trl_does(model)
    if in_place:
        model.compile(backend=aot_eager)
    compiled = model if in_place else torch.compile(model, backend=aot_eager)
    take_pass(compiled)
    for tensor in TENSORS:
        assert torch.equal(value_of(model, tensor), base.get_parameter(tensor).float()), tensor
        assert value_of(model, tensor).grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    base = make_model("llama")
    model = wrapped(copy.deepcopy(base), TENSORS)
    as_trl_does(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    take_pass(model.train())
    plain = copy.deepcopy(base)
    take_pass(plain)
    for tensor in TENSORS:
        torch.testing.assert_close(value_of(model, tensor).grad, plain.get_parameter(tensor).grad)
        assert torch.equal(value_of(model, tensor), base.get_parameter(tensor)), tensor


def arguments(path, cls=TrainingArguments, **options):
    common = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "report_to": [],
        "use_cpu": True,
    }
    return cls(path, **common | {"save_steps": 1, "logging_steps": 1} | options)


def make_sft(path, cast_by_trl=True, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = get_peft_model(
        make_model("llama").to(torch.bfloat16), GreenTrainerConfig(rho=0.6, reselect=2, task_type="CAUSAL_LM")
    )
    model.base_model.model.is_loaded_in_4bit = cast_by_trl
    trainer = trl.SFTTrainer(
        model,
        args=arguments(path, trl.SFTConfig, bf16=True, max_length=32, gradient_checkpointing=False, **options),
        train_dataset=datasets.Dataset.from_dict({"text": make_text(16)}),
        processing_class=make_tokenizer(),
        callbacks=[GreenTrainerCallback()],
    )
    values = trained(trainer.model)
    assert {p.dtype for p in values.values()} == {torch.bfloat16 if cast_by_trl else torch.float32}
    model.base_model.model.is_loaded_in_4bit = False
    return trainer


def test_trl_casts_what_requires_grad(tmp_path):
    expected = make_sft(tmp_path / "plain", cast_by_trl=False)
    expected.train()
    trainer = make_sft(tmp_path / "cast")
    trainer.train()
    values, others = trained(trainer.model), trained(expected.model)
    assert values.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in values.items())  # LoRA's are not: they stay cast


def test_trl_casts_what_a_checkpoint_is_loaded_into(tmp_path):
    whole = make_sft(tmp_path)
    whole.train()
    resumed = make_sft(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    values, others = trained(resumed.model), trained(whole.model)
    assert values.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in values.items())


def test_modules_to_save_are_pefts(tmp_path):
    model = get_peft_model(make_model("bert-sequences"), GreenTrainerConfig(rho=0.8, task_type="SEQ_CLS"))
    as_trl_does(model)
    data = [{name: value[i] for name, value in make_batch("bert-sequences").items()} for i in range(4)]
    Trainer(
        model, arguments(tmp_path, max_steps=2, bf16=True), train_dataset=data, callbacks=[GreenTrainerCallback()]
    ).train()
    dtypes = {name: p.dtype for name, p in trained(model).items()}
    assert {dtype for name, dtype in dtypes.items() if "greentrainer_values" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "modules_to_save" in name} == {torch.bfloat16}


@pytest.mark.parametrize("float32", [True, False])
def test_values_are_float32_on_a_half_precision_base(float32, tmp_path):
    base = make_model("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), GreenTrainerConfig(), autocast_adapter_dtype=float32)
    tensors = train_a_little(model, "llama")
    values = [p for n, p in model.named_parameters() if "greentrainer_values" in n]
    assert len(values) == len(tensors)
    assert {v.dtype for v in values} == {torch.float32 if float32 else torch.bfloat16}
    after = outputs(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=float32)
    assert torch.equal(outputs(loaded, "llama"), after)
    assert torch.equal(outputs(loaded.merge_and_unload(), "llama"), after)


def test_every_selected_tensor_moves_on_a_bfloat16_base_at_a_small_rate():
    model = get_peft_model(make_model("llama").bfloat16(), GreenTrainerConfig())
    base = model.get_base_model()
    tensors = sorted(candidates(base, model.peft_config["default"]))
    set_values(base, "default", tensors)
    set_selection(base, "default", tensors)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for step in range(3):
        model(**make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == len(tensors)
    assert all((p != before[n]).any() for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5"])
def test_a_merged_model_that_changes_its_type_is_unmerged_in_it(kind):
    model = get_peft_model(make_model(kind), GreenTrainerConfig(rho=1.0, init_weights=False))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for name, p in model.named_parameters()} == {torch.bfloat16}
    with model.disable_adapter():
        assert torch.equal(outputs(model, kind), outputs(make_model(kind).bfloat16(), kind))


def test_a_model_that_was_merged_in_inference_mode_can_be_trained():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(init_weights=False))
    with torch.inference_mode():
        merged = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged(**make_batch("llama")).loss.backward()
    torch.optim.SGD(merged.parameters(), lr=0.1).step()
