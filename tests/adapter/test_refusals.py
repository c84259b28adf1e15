"""What cannot be done, or is not done as one may expect, is said in a sentence that tells what to do instead."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.loop import Loop
from helpers.models import make_batch, make_model, make_text, make_tokenizer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BatchEncoding, DynamicCache
from trl import SFTConfig, SFTTrainer, clone_chat_template

from peft_greentrainer import GreenTrainerCallback, GreenTrainerConfig, GreenTrainerLayer, flop_counter
from peft_greentrainer.adapter.values import candidates
from peft_greentrainer.training.probe_inputs import FirstRows


def candidates_of(model, adapter="default"):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(candidates(base, base.peft_config[adapter]))


def freeze(model, *parts):
    frozen = set()
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)
            frozen.add(name)
    return frozen


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def quietly(call):
    """What a call gives, when it must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


# Parts that were frozen before wrapping


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("llama", ["layers.0."]), ("clip", ["vision_model"]), ("llama-tied", ["embed_tokens"]), ("convnet", ["mix"])],
)
def test_what_was_frozen_before_is_no_candidate_and_it_is_said(kind, parts):
    base = make_model(kind)
    before, frozen = names_of(base), freeze(base, *parts)
    with pytest.warns(UserWarning, match=f"{parts[0].rstrip('.').split('.')[0]}.*target_modules"):
        model = get_peft_model(base, GreenTrainerConfig(rho=1.0))
    found = candidates_of(model)
    assert found and found == candidates_of(get_peft_model(make_model(kind), GreenTrainerConfig())) - frozen
    assert frozen and frozen <= before - found
    loop = Loop(model, kind).run(3)
    assert loop.selection.tensors == found


def test_frozen_parts_count_in_the_cost_of_full_fine_tuning():
    base = make_model("llama")
    freeze(base, "layers.0.", "layers.1.")
    with pytest.warns(UserWarning, match="layers"):
        loop = Loop(get_peft_model(base, GreenTrainerConfig(rho=0.5))).run(3)
    with flop_counter() as full:
        make_model("llama")(**make_batch("llama")).loss.backward()
    with flop_counter() as counted:
        loop.step()
    assert counted.get_total_flops() == pytest.approx(loop.selection.ratio * full.get_total_flops(), rel=1e-9)


def test_the_model_itself_may_freeze_a_part():
    base = make_model("whisper")
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad}
    assert frozen == {"model.encoder.embed_positions.weight"}
    with pytest.warns(UserWarning, match="model.encoder.embed_positions.weight.*target_modules"):
        model = get_peft_model(base, GreenTrainerConfig())
    assert not frozen & candidates_of(model)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*\.(q|up)_proj", "all-linear"], ids=str)
def test_target_modules_names_what_is_trained_be_it_frozen_or_not(targets):
    base = make_model("llama")
    freeze(base, "layers.0.", "norm")
    with pytest.warns(UserWarning, match=r"q_proj.*exclude_modules") as told:
        model = get_peft_model(base, GreenTrainerConfig(target_modules=targets))
    assert not any("norm" in str(warning.message) for warning in told)
    right = get_peft_model(make_model("llama"), GreenTrainerConfig(target_modules=targets))
    assert candidates_of(model) == candidates_of(right)


def test_nothing_is_said_where_nothing_or_everything_is_frozen_or_what_is_frozen_is_not_named():
    every = candidates_of(quietly(lambda: get_peft_model(make_model("llama"), GreenTrainerConfig())))
    frozen = make_model("llama").requires_grad_(False)
    assert candidates_of(quietly(lambda: get_peft_model(frozen, GreenTrainerConfig()))) == every
    for options in (
        {"exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["lm_head", "norm"], "exclude_modules": ["layers.0.input_layernorm"]},
        {"layers_to_transform": [1, 2]},
    ):
        base = make_model("llama")
        freeze(base, "layers.0.")
        model = quietly(lambda: get_peft_model(base, GreenTrainerConfig(**options)))
        assert candidates_of(model) == candidates_of(
            get_peft_model(make_model("llama"), GreenTrainerConfig(**options))
        )


def test_where_all_that_may_be_trained_was_frozen_it_is_trained_and_that_is_said():
    base = make_model("llama")
    freeze(base, "layers.0.")
    with pytest.warns(UserWarning, match=r"layers.*q_proj.*exclude_modules"):
        model = get_peft_model(base, GreenTrainerConfig(layers_to_transform=[0]))
    assert len(candidates_of(model)) == 9
    base = make_model("bert-sequences")
    freeze(base, "bert.")
    with pytest.warns(UserWarning, match=r"bert.*exclude_modules"):
        model = get_peft_model(base, GreenTrainerConfig(task_type="SEQ_CLS"))
    right = get_peft_model(make_model("bert-sequences"), GreenTrainerConfig(task_type="SEQ_CLS"))
    assert candidates_of(model) == candidates_of(right)


def test_modules_to_save_are_trained_though_they_were_frozen():
    base = make_model("llama")
    freeze(base, "lm_head")
    model = quietly(lambda: get_peft_model(base, GreenTrainerConfig(modules_to_save=["lm_head"])))
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad
    assert len(candidates_of(model)) == len(names_of(make_model("llama"))) - 1


def test_only_one_use_of_a_tied_tensor_is_frozen_with_the_other():
    base = make_model("llama-tied")
    base.lm_head.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="model.embed_tokens.weight"):
        model = get_peft_model(base, GreenTrainerConfig())
    assert "model.embed_tokens.weight" not in candidates_of(model)


@pytest.mark.parametrize("native", [False, True])
def test_a_second_adapter_takes_over_what_was_frozen_before_the_first(native):
    base = make_model("llama")
    frozen = freeze(base, "layers.0.")
    with pytest.warns(UserWarning, match="layers"):
        if native:
            model = base
            model.add_adapter(GreenTrainerConfig(), "default")
            model.add_adapter(GreenTrainerConfig(), "second")
        else:
            model = get_peft_model(base, GreenTrainerConfig())
            model.add_adapter("second", GreenTrainerConfig())
    assert candidates_of(model, "second") == candidates_of(model) == names_of(make_model("llama")) - frozen
    with pytest.warns(UserWarning, match="layers.*exclude_modules"):
        third = GreenTrainerConfig(target_modules=["q_proj"])
        model.add_adapter(third, "third") if native else model.add_adapter("third", third)
    assert len(candidates_of(model, "third")) == 3


def test_a_second_adapter_of_a_base_that_nobody_froze_has_every_candidate():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(exclude_modules=["lm_head"]))
    quietly(lambda: model.add_adapter("second", GreenTrainerConfig()))
    assert candidates_of(model, "second") == names_of(make_model("llama"))


@pytest.mark.parametrize("here", ["free", "frozen", "partly"])
@pytest.mark.parametrize("there", ["free", "partly"])
def test_what_a_file_names_is_loaded_whatever_is_frozen(there, here, tmp_path):
    def base(state):
        model = make_model("llama")
        freeze(model, *{"free": [], "frozen": [""], "partly": ["layers.0."]}[state])
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(there), GreenTrainerConfig(rho=1.0))
        Loop(model).run(3)
    model.save_pretrained(tmp_path)
    loaded = quietly(lambda: PeftModel.from_pretrained(base(here), tmp_path, is_trainable=True))
    assert torch.equal(loaded(**make_batch("llama")).logits, model(**make_batch("llama")).logits)
    # It is trained further as it was begun.
    assert candidates_of(loaded) == candidates_of(model)
    assert (Loop(loaded).run(3).selection.tensors) == candidates_of(model)
    json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_config_that_is_used_again_forgets_what_was_frozen_in_another_model():
    config = GreenTrainerConfig()
    base = make_model("llama")
    freeze(base, "layers.0.")
    with pytest.warns(UserWarning, match="layers"):
        get_peft_model(base, config)
    model = quietly(lambda: get_peft_model(make_model("llama"), config))
    assert candidates_of(model) == names_of(make_model("llama"))
    base = make_model("bert")
    freeze(base, "embeddings")
    with pytest.warns(UserWarning, match="bert.embeddings"):
        get_peft_model(base, config)


@pytest.mark.parametrize("low_rank", ["also", "only"])
def test_what_was_frozen_has_no_low_rank_form(low_rank):
    base = make_model("llama")
    freeze(base, "layers.0.")
    with pytest.warns(UserWarning, match="layers"):
        model = get_peft_model(base, GreenTrainerConfig(low_rank=low_rank))
    assert not any("layers.0." in name for name in candidates_of(model))
    assert any("low_rank" in name for name in candidates_of(model))


# Embeddings of another size


def adapted(kind, how, **options):
    """The model to call, and the base model, with an adapter that was added in one of three ways."""
    base = make_model(kind)
    if how == "native":
        base.add_adapter(GreenTrainerConfig(**options))
        return base, base
    model = get_peft_model(base, GreenTrainerConfig(**options))
    return (model if how == "peft" else model.base_model), base


def picture(model):
    """All that a resizing would change."""
    sizes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return str(model), sizes, model.config.to_dict(), {name: t.clone() for name, t in model.state_dict().items()}


def same(one, other):
    tensors, others = one[-1], other[-1]
    return one[:-1] == other[:-1] and all(torch.equal(tensors[name], others[name]) for name in tensors | others)


WAYS = ["peft", "tuner", "native"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "bart", "bert", "t5"])
@pytest.mark.parametrize(
    ("args", "options"),
    [((104,), {}), ((90,), {}), ((None, 64), {}), ((97,), {"mean_resizing": False}), ((), {"new_num_tokens": 100})],
    ids=str,
)
def test_a_wrapped_embedding_is_not_resized_and_it_is_said_what_to_do(kind, how, args, options):
    model, base = adapted(kind, how)
    before = picture(base)
    with pytest.raises(ValueError, match="before.*exclude_modules"):
        model.resize_token_embeddings(*args, **options)
    assert same(picture(base), before)
    model(**make_batch(kind))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "bart", "bert", "t5"])
@pytest.mark.parametrize("args", [(), (96,), (None, 32), (90, 32)], ids=str)
def test_a_resizing_to_the_size_it_has_changes_nothing(kind, how, args):
    model, base = adapted(kind, how)
    batch = make_batch(kind)
    base.eval()
    before, logits = picture(base), model(**batch).logits
    assert model.resize_token_embeddings(*args).weight.shape[0] == 96
    assert same(picture(base), before) and torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_an_embedding_that_is_not_wrapped_is_resized_as_ever(kind, how):
    options = {"exclude_modules": ["embed_tokens", "lm_head"]}
    model, base = adapted(kind, how, **options)
    torch.manual_seed(0)
    model.resize_token_embeddings(104)
    right = make_model(kind)
    torch.manual_seed(0)
    right.resize_token_embeddings(104)
    assert base.config.vocab_size == 104 and base.lm_head.weight.shape == (104, 32)
    batch = make_batch(kind)
    assert torch.equal(base.eval()(**batch).logits, right.eval()(**batch).logits)
    if how == "peft":
        assert Loop(model).run(3).selection.ratio <= 0.5


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
def test_a_module_to_save_or_a_wrapper_of_one_of_the_two_is_not_resized_either(kept):
    other = "lm_head" if kept == "embed_tokens" else "embed_tokens"
    for options in ({"exclude_modules": [other]}, {"target_modules": ["q_proj"], "modules_to_save": [kept]}):
        model, base = adapted("llama", "peft", **options)
        before = picture(base)
        with pytest.raises(ValueError, match=f"{kept}.*before"):
            model.resize_token_embeddings(104)
        assert same(picture(base), before)


def test_parts_of_a_model_refuse_too():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    with pytest.raises(ValueError, match="before.*exclude_modules"):
        model.get_base_model().model.resize_token_embeddings(104)

    class Reward(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm, self.value = make_model("llama"), nn.Linear(96, 1)

    reward = get_peft_model(Reward(), GreenTrainerConfig())
    with pytest.raises(ValueError, match="embed_tokens.*before.*exclude_modules"):
        reward.llm.resize_token_embeddings(104)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "second adapter", "compile"])
def test_it_is_still_refused_afterwards(way, tmp_path):
    model, base = adapted("llama", "peft")
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    elif way == "second adapter":
        model.add_adapter("second", GreenTrainerConfig())
        model.delete_adapter("default")
    else:
        model = torch.compile(model, backend="eager")
    before, here = picture(base), picture(model)
    with pytest.raises(ValueError, match="before.*exclude_modules"):
        model.resize_token_embeddings(104)
    assert same(picture(model), here) and same(picture(base), before)
    if way in ("deepcopy", "pickle"):  # the copy looks at itself
        assert model.resize_token_embeddings() is not base.model.embed_tokens
        base = model.unload()
        base.resize_token_embeddings(104)
        assert base(**make_batch("llama")).logits.shape[-1] == 104


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_a_base_without_wrappers_is_resized_as_ever(unload):
    model, base = adapted("llama", "peft")
    attributes = vars(make_model("llama")).keys()
    base = getattr(model, unload)()
    assert {name for name in vars(base).keys() - attributes if "embeddings" in name} == set()
    base.resize_token_embeddings(104)
    assert base(**make_batch("llama")).logits.shape[-1] == 104
    model = get_peft_model(base, GreenTrainerConfig())
    with pytest.raises(ValueError, match="before.*exclude_modules"):
        model.resize_token_embeddings(96)


def test_a_wrapping_that_is_refused_leaves_the_model_as_it_was():
    base = make_model("llama")
    before = set(vars(base))
    with pytest.raises(ValueError, match="matches no module"):
        get_peft_model(base, GreenTrainerConfig(target_modules=["nothing"]))
    assert set(vars(base)) == before


@pytest.mark.parametrize("how", WAYS)
def test_another_module_is_not_set_in_place_of_a_wrapped_one(how):
    model, base = adapted("llama", how)
    before = picture(base)
    with pytest.raises(ValueError, match="embed_tokens.*before.*exclude_modules"):
        model.set_input_embeddings(nn.Embedding(96, 32))
    with pytest.raises(ValueError, match="lm_head.*before.*exclude_modules"):
        model.set_output_embeddings(nn.Linear(32, 96, bias=False))
    assert same(picture(base), before)
    # What one gets may be set again.
    model.set_input_embeddings(model.get_input_embeddings())
    model.set_output_embeddings(model.get_output_embeddings())
    assert same(picture(base), before)
    assert isinstance(base.lm_head, GreenTrainerLayer) and isinstance(base.model.embed_tokens, GreenTrainerLayer)

    model, base = adapted("llama", how, exclude_modules=["embed_tokens", "lm_head"])
    head = nn.Linear(32, 96, bias=False)
    model.set_output_embeddings(head)
    assert base.lm_head is head


# A chat template that adds tokens


def template_with_new_tokens(path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos> {% endfor %}"
    tokenizer.save_pretrained(path)
    return str(path)


def sft_trainer(model, tokenizer, tmp_path, **options):
    text = make_text(16)
    data = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in text]}
    )
    peft_config = options.pop("peft_config", None)
    args = SFTConfig(
        str(tmp_path / "out"), max_steps=3, report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2, **options
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[GreenTrainerCallback()],
    )


ADVICE = r"modules_to_save=\['embed_tokens'.*chat_template_path"


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj"]}], ids=str)
def test_a_chat_template_that_adds_tokens_is_refused_with_advice(options, tmp_path):
    base, path = make_model("llama"), template_with_new_tokens(tmp_path / "template")
    with pytest.raises(ValueError, match=ADVICE):
        sft_trainer(
            base, make_tokenizer(), tmp_path, peft_config=GreenTrainerConfig(**options), chat_template_path=path
        )
    assert not any(isinstance(module, GreenTrainerLayer) for module in base.modules())


def test_the_advice_on_chat_templates_trains_the_new_tokens(tmp_path):
    path = template_with_new_tokens(tmp_path / "template")
    base, tokenizer, added = clone_chat_template(make_model("llama"), make_tokenizer(), path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = GreenTrainerConfig(rho=0.9, modules_to_save=["embed_tokens", "lm_head"])
    trainer = sft_trainer(base, tokenizer, tmp_path, peft_config=config)
    trainer.train()
    after = trainer.model.merge_and_unload().state_dict()
    new = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert set(new) <= set(added)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (after[name][new] != before[name][new]).any(dim=1).all()


def test_a_chat_template_without_new_tokens_trains_as_ever(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    config, path = GreenTrainerConfig(rho=0.9), str(tmp_path / "template.jinja")
    trainer = sft_trainer(make_model("llama"), make_tokenizer(), tmp_path, peft_config=config, chat_template_path=path)
    trainer.train()
    assert config.trainable_token_indices is None and not config.provisional


def test_a_model_that_is_wrapped_already_gets_no_new_tokens(tmp_path):
    path = template_with_new_tokens(tmp_path / "template")
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    with pytest.raises(ValueError, match="resize_token_embeddings would change.*before it is wrapped"):
        sft_trainer(model, make_tokenizer(), tmp_path, chat_template_path=path)


@pytest.mark.parametrize("indices", [[3, 4], [], {"embed_tokens": [3]}, {}, {"lm_head": [1]}], ids=str)
def test_single_rows_of_an_embedding_are_not_trained(indices):
    with pytest.raises(ValueError, match=r"trainable_token_indices.*modules_to_save=\["):
        GreenTrainerConfig(trainable_token_indices=indices)
    for native in (False, True):
        config, base = GreenTrainerConfig(), make_model("llama")
        config.trainable_token_indices = indices
        before = picture(base)
        with pytest.raises(ValueError, match=r"trainable_token_indices.*modules_to_save=\["):
            base.add_adapter(config) if native else get_peft_model(base, config)
        assert same(picture(base), before)
    model, config = get_peft_model(make_model("llama"), GreenTrainerConfig()), GreenTrainerConfig()
    config.trainable_token_indices = indices
    before = picture(model)
    with pytest.raises(ValueError, match=r"trainable_token_indices.*modules_to_save=\["):
        model.add_adapter("second", config)
    assert same(picture(model), before)


# Rows of a batch


class Patches(nn.Module):
    """Tokens, and the patches of all images in one tensor: as many for each as its grid says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.patch, self.head = nn.Embedding(9, 8), nn.Linear(6, 8), nn.Linear(8, 9)
        self.rows = []

    def forward(self, pixel_values=None, grid=None, input_ids=None, labels=None, **others):
        self.rows.append(len(input_ids))
        hidden = self.embed(input_ids)
        if pixel_values is not None:
            if isinstance(pixel_values, (list, tuple)):
                pixel_values = torch.cat(list(pixel_values))
            images = self.patch(pixel_values).split(grid.prod(1).tolist())
            hidden = hidden + torch.stack([image.mean(0) for image in images])[:, None]
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def patches_batch(rows=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (rows, 5), generator=generator)
    grid = torch.tensor([[1, 2, 2]] * rows)
    return {
        "pixel_values": torch.randn(4 * rows, 6, generator=generator),
        "grid": grid,
        "input_ids": ids,
        "labels": ids,
    }


def train_on(batch, **options):
    base = Patches()
    model = get_peft_model(base, GreenTrainerConfig(rho=1.0, **options))
    loop = Loop(model)
    for _ in range(3):
        loop.step(batch=batch)
    return base, loop


def test_patches_of_images_are_not_cut_and_it_is_said_what_to_do():
    batch = patches_batch()
    for order in (batch, dict(reversed(batch.items()))):
        with pytest.raises(ValueError, match=r"pixel_values of shape \(16, 6\).*probe_batch_size=None"):
            train_on(order, probe_batch_size=2)
        assert train_on(order)[1].selection.ratio <= 1.0
    texts = {name: batch[name] for name in ("input_ids", "labels")}
    base, loop = train_on(texts, probe_batch_size=2)
    assert base.rows.count(2) == 1 and loop.selection is not None


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"position_ids": torch.zeros(3, 4, 5)}, r"position_ids of shape \(3, 4, 5\)"),
        ({"cu_seq_lens": torch.zeros(7)}, r"cu_seq_lens of shape \(7,\)"),
        ({"extra": {"patches": torch.zeros(9, 2)}}, r"extra\['patches'\] of shape \(9, 2\)"),
        ({"images": [torch.zeros(2, 3), torch.zeros(5, 3)]}, "images, 2 entries with tensors"),
        ({"images": [torch.zeros(1, 3)] * 5}, "images, 5 entries with tensors"),
        ({"states": (torch.zeros(4, 3),) * 4}, "states, 4 entries with tensors"),
        ({"past_key_values": DynamicCache()}, "past_key_values, a DynamicCache"),
        ({"images": np.zeros((4, 3))}, "images, a ndarray"),
        ({"pixel_values": torch.zeros(9, 3), "grid": torch.zeros(2, 3)}, r"pixel_values.*, grid of shape \(2, 3\)"),
    ],
    ids=str,
)
def test_inputs_without_rows_are_refused_by_name(inputs, name):
    ids = torch.zeros(4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"batch of 4 .*{name}.*probe_batch_size=None"):
        FirstRows(2).cut((), inputs | {"input_ids": ids})


def test_position_ids_in_three_parts_are_refused_also_where_there_are_three_rows():
    batch = {"input_ids": torch.zeros(3, 5), "position_ids": torch.zeros(3, 3, 5)}
    with pytest.raises(ValueError, match="position_ids.*probe_batch_size=None"):
        FirstRows(2).cut((), batch)


def test_inputs_with_rows_are_cut_and_others_stay():
    rows = torch.arange(20).reshape(4, 5)
    whole = {"position_ids": rows[:1], "scale": torch.tensor(3.0), "use_cache": False, "kind": "text", "none": None}
    whole |= {"layers": [1, 2], "dtype": torch.float32, "loss": nn.functional.mse_loss, "sizes": {"height": 3}}
    args, kwargs = FirstRows(2).cut((rows, 3), whole | {"mask": rows, "names": ["a", "b", "c", "d"]})
    assert torch.equal(args[0], rows[:2]) and args[1] == 3
    assert torch.equal(kwargs.pop("mask"), rows[:2]) and kwargs.pop("names") == ["a", "b"]
    assert list(kwargs) == list(whole) and all(kwargs[name] is whole[name] for name in list(whole)[:5])
    assert kwargs["layers"] == [1, 2] and kwargs["sizes"] == {"height": 3}


def test_nested_inputs_are_cut():
    rows = torch.arange(20).reshape(4, 5)
    images = [torch.zeros(n, 3) for n in (2, 7, 3, 5)]
    inner = {"input_ids": rows, "targets": [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 3, 0)]}
    args, kwargs = FirstRows(3).cut((inner,), {"images": images, "states": (rows, rows, rows[:1])})
    assert torch.equal(args[0]["input_ids"], rows[:3]) and args[0]["targets"] == inner["targets"][:3]
    assert len(inner["input_ids"]) == 4  # what the step itself gets
    assert kwargs["images"] == images[:3]
    assert [len(state) for state in kwargs["states"]] == [3, 3, 1]
    encoding, _ = FirstRows(2).cut((BatchEncoding({"input_ids": rows}),), {})
    assert isinstance(encoding[0], BatchEncoding) and torch.equal(encoding[0].input_ids, rows[:2])


@pytest.mark.parametrize("rows", [4, 9])
def test_a_batch_with_no_more_rows_is_measured_whole(rows):
    batch = {"input_ids": torch.zeros(4, 5), "mask": torch.zeros(4, 1, 1, 5), "position_ids": torch.zeros(1, 5)}
    _, kwargs = FirstRows(rows).cut((), batch)
    assert all(torch.equal(kwargs[name], batch[name]) for name in batch)


@pytest.mark.parametrize("unit", ["flops", "seconds"])
def test_an_error_in_a_pass_on_some_rows_tells_what_to_do(unit):
    batch = patches_batch()
    # As many patches as rows, so that they look like one for each row; but the first image has two.
    batch["pixel_values"], batch["grid"] = (
        torch.randn(4, 6),
        torch.tensor([[1, 1, 2], [1, 1, 1], [1, 1, 1], [0, 0, 0]]),
    )
    batch["grid"][3] = torch.tensor([0, 1, 1])
    model = get_peft_model(Patches(), GreenTrainerConfig(probe_batch_size=2, unit=unit))
    model.base_model.update_and_allocate(0, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="RuntimeError.*probe_batch_size=None") as told:
        model(**batch)
    assert isinstance(told.value.__cause__, RuntimeError)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "greentrainer_values" not in name)


def test_running_out_of_memory_in_such_a_pass_stays_what_it_is():
    class Hungry(Patches):
        def forward(self, **inputs):
            if len(inputs["input_ids"]) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(**inputs)

    model = get_peft_model(Hungry(), GreenTrainerConfig(probe_batch_size=2))
    model.base_model.update_and_allocate(0, torch.optim.AdamW(model.parameters()))
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory.$"):
        model(**{name: patches_batch()[name] for name in ("input_ids", "labels")})


# What does not fit any more


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp"])
def test_a_module_that_was_put_in_place_of_a_wrapped_one_is_named(part):
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.9, reselect=1))
    loop = Loop(model).run(2)
    parent, _, name = part.rpartition(".")
    setattr(model.get_base_model().get_submodule(parent), name, make_model("llama").get_submodule(part))
    with pytest.raises(ValueError, match=f"{part}.*before.*get_peft_model"):
        loop.run(3)


def test_a_file_that_an_adapter_has_no_place_for_is_an_adapter_of_its_own(tmp_path):
    trained = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=1.0))
    Loop(trained).run(3)
    trained.save_pretrained(tmp_path)
    base = make_model("llama")
    freeze(base, "layers.0.")
    with pytest.warns(UserWarning, match="layers"):
        model = get_peft_model(base, GreenTrainerConfig())
    with pytest.raises(ValueError, match="no place for.*layers.0.*another name"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "another")
    model.set_adapter("another")
    batch = make_batch("llama")
    assert torch.equal(model.eval()(**batch).logits, trained.eval()(**batch).logits)


def test_an_adapter_with_the_name_of_a_module_is_refused_beside_others():
    """peft's files of the others would lack that module, in silence: LoRA's do."""
    base = make_model("llama")
    model = get_peft_model(base, GreenTrainerConfig(), adapter_name="norm")  # alone it does no harm
    with pytest.raises(ValueError, match="called 'norm', as a module of this model.*another name"):
        model.add_adapter("other", GreenTrainerConfig())
    model = get_peft_model(make_model("llama"), GreenTrainerConfig())
    with pytest.raises(ValueError, match="called 'mlp', as a module of this model.*another name"):
        model.add_adapter("mlp", GreenTrainerConfig())
    model.add_adapter("another", GreenTrainerConfig())
