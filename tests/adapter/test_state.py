"""State dicts of whole models: what was saved is what is loaded, with its selection, wherever people keep them."""

import copy
import json

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_batch, make_model
from helpers.training import outputs, train_a_little
from peft import PeftModel, get_base_model_state_dict, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.training.allocator import allocator_of


CONFIG = {"rho": 0.7, "reselect": 2}


def make(kind="llama", dtype=torch.float32, **config):
    return get_peft_model(make_model(kind).to(dtype), GreenTrainerConfig(**CONFIG | config))


def make_trained(kind="llama", dtype=torch.float32, steps=5, **config):
    model = make(kind, dtype, **config)
    Loop(model, kind).run(steps)
    return model


def check_same(model, other, kind="llama"):
    assert torch.equal(outputs(model, kind), outputs(other, kind))
    found, expected = model.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    for name, config in other.peft_config.items():
        mine = model.peft_config[name]
        assert (mine.tensors, mine.selected, mine.provisional) == (config.tensors, config.selected, config.provisional)


def through_torch(model, new, path):
    torch.save(model.state_dict(), path)
    new.load_state_dict(torch.load(path, weights_only=True))


def through_assignment(model, new, path):
    torch.save(model.state_dict(), path)
    new.load_state_dict(torch.load(path, weights_only=True, mmap=True), assign=True)


def through_safetensors(model, new, path):
    save_model(model, path)
    load_model(new, path)


def through_safetensors_files(model, new, path):
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    new.load_state_dict(load_file(path))


def through_torchs_checkpoints(model, new, path):
    torch.save(get_model_state_dict(model), path)
    set_model_state_dict(new, torch.load(path, weights_only=True))


WAYS = [
    through_torch,
    through_assignment,
    through_safetensors,
    through_safetensors_files,
    through_torchs_checkpoints,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("t5", {"low_rank": "also", "r": 4}),
        ("gpt2", {"low_rank": "only", "r": 2}),
        ("llama", {"dtype": torch.bfloat16, "low_rank": "also", "r": 4}),
    ],
    ids=str,
)
def test_a_trained_state_and_a_new_one_load_into_each_other(way, kind, config, tmp_path):
    model, new = make_trained(kind, **config), make(kind, **config)
    other_new = make(kind, **config)
    assert set(model.state_dict()) != set(new.state_dict())
    way(model, new, tmp_path / "trained")
    check_same(new, model, kind)
    way(other_new, model, tmp_path / "new")
    check_same(model, other_new, kind)
    assert model.peft_config["default"].provisional


def test_what_is_loaded_is_saved_as_it_would_have_been(tmp_path):
    model, new = (
        make_trained(),
        get_peft_model(make_model("llama", initializer_range=0.5), GreenTrainerConfig(**CONFIG)),
    )
    new.load_state_dict(model.state_dict())
    for name, saved in (("model", model), ("new", new)):
        saved.save_pretrained(tmp_path / name)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "model"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "new")
    assert torch.equal(outputs(loaded, "llama"), outputs(model, "llama"))
    assert torch.equal(outputs(new.merge_and_unload(), "llama"), outputs(model, "llama"))


@pytest.mark.parametrize("save_embedding_layers", ["auto", True])
def test_pefts_files_and_the_base_state_are_as_they_were(save_embedding_layers):
    model = make("llama-tied", target_modules=["embed_tokens", "q_proj", "norm"])
    train_a_little(model, "llama", ["model.norm.weight"])
    file = get_peft_model_state_dict(model, save_embedding_layers=save_embedding_layers)
    assert [key for key in file if "base_layer" not in key] == [
        "base_model.model.model.norm.greentrainer_values.weight"
    ]
    base = get_base_model_state_dict(model)
    expected = make_model("llama-tied").state_dict()
    assert base.keys() == expected.keys() and all(torch.equal(base[key], expected[key]) for key in base)


class Container(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(96, 2)

    def forward(self, input_ids, labels, **_):
        logits = self.head(self.model(input_ids).logits.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0] % 2), "logits": logits}


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "container": Container,
    "list": lambda model: nn.ModuleList([nn.Linear(2, 2), model]),
    "base model": lambda model: model.get_base_model(),
    "part": lambda model: model.get_base_model().model.layers,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_states_of_what_is_around_a_model_and_inside(wrap):
    model, new = make_trained(), make()
    outside, others = wrap(model), wrap(new)
    others.load_state_dict(outside.state_dict())
    found, expected = others.state_dict(), outside.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    if others is not new.get_base_model().model.layers:
        check_same(new, model)
    else:  # training or saving tells the config
        Loop(new).step()
        in_part = {name for name in model.peft_config["default"].tensors if ".layers." in name}
        assert in_part == {name for name in new.peft_config["default"].tensors if ".layers." in name}


def test_states_under_ddp_and_of_it(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, new = make_trained(), make()
        other = DistributedDataParallel(new)
        other.load_state_dict({f"module.{key}": value for key, value in model.state_dict().items()})
        check_same(new, model)
        new = make()
        new.load_state_dict(
            {k.removeprefix("module."): v for k, v in DistributedDataParallel(model).state_dict().items()}
        )
        check_same(new, model)
        new = make()
        # torch itself asks a DistributedDataParallel for every key that it has now: without it, it does not.
        set_model_state_dict(new, get_model_state_dict(DistributedDataParallel(model)))
        check_same(new, model)
    finally:
        torch.distributed.destroy_process_group()


def test_several_adapters():
    def both(train):
        model = make()
        model.add_adapter("second", GreenTrainerConfig(rho=0.4))
        for name, tensors in (("default", ["lm_head.weight"]), ("second", ["model.norm.weight", "lm_head.weight"])):
            model.set_adapter(name)
            if train:
                Loop(model).run(4)
        return model

    model, new = both(True), both(False)
    new.load_state_dict(model.state_dict())
    for name in ("default", "second"):
        model.set_adapter(name), new.set_adapter(name)
        check_same(new, model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*greentrainer_values.second"):
        make().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*greentrainer_values.second"):
        both(True).load_state_dict(make_trained().state_dict())


def test_a_state_of_what_is_trained_drops_nothing():
    model, new = make_trained(), make()
    here = set(new.peft_config["default"].tensors)
    state = {name: p.detach() for name, p in model.named_parameters() if ".greentrainer_values." in name}
    result = new.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(new.peft_config["default"].tensors) == here | set(
        model.peft_config["default"].tensors
    )
    assert all(torch.equal(new.state_dict()[key], value) for key, value in state.items())
    assert set(model.peft_config["default"].tensors) <= set(new.peft_config["default"].selected)
    assert torch.equal(outputs(new, "llama"), outputs(model, "llama"))


@pytest.mark.parametrize("change", [{"low_rank": "also", "r": 8}, {"low_rank": "only"}, {"low_rank": False}])
def test_what_another_config_has_no_place_for_is_refused_by_name(change):
    model = make_trained(low_rank="also", r=4)
    with pytest.raises((RuntimeError, ValueError), match="size mismatch|Unexpected key|has no place for"):
        make(**change).load_state_dict(model.state_dict())


def test_copies_and_states_that_were_cast(tmp_path):
    model = make_trained()
    state = copy.deepcopy(model.state_dict())
    check_same(copy.deepcopy(model), model)
    new = make()
    copy.deepcopy(new).load_state_dict(state)
    assert new.peft_config["default"].provisional
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        new = make()
        new.load_state_dict({key: value.to(dtype) for key, value in state.items()})
        assert new.peft_config["default"].selected == model.peft_config["default"].selected
    torch.save(model, tmp_path / "model")
    check_same(torch.load(tmp_path / "model", weights_only=False), model)
    merged = model.merge_and_unload()
    assert not merged._load_state_dict_pre_hooks and not merged._load_state_dict_post_hooks
    plain = make_model("llama")
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(outputs(plain, "llama"), outputs(merged, "llama"))


def test_a_native_adapter_of_transformers():
    def native():
        base = make_model("llama")
        base.add_adapter(GreenTrainerConfig(**CONFIG))
        return base

    base, new = native(), native()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        base(**make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
        allocator_of(base).update(step, optimizer)
        optimizer.zero_grad()
    new.load_state_dict(base.state_dict())
    check_same(new, base)


def run_of(model, steps, path=None):
    """A plain loop with checkpoints of its own, resumed where one is found: the losses and what is saved in the end."""
    saved = torch.load(path, weights_only=True) if path is not None and path.exists() else None
    if saved:
        model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        model.base_model.resume_allocation(saved["allocation"], optimizer)
    losses = []
    for step in range(saved["step"] if saved else 0, steps):
        loss = model(**make_batch("llama", seed=step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    if path is not None and not saved:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
        state["allocation"] = model.base_model.allocation_state_dict()
        assert json.loads(json.dumps(state["allocation"])) == state["allocation"]
        torch.save(state, path)
    return losses


@pytest.mark.parametrize(
    "config", [{}, {"low_rank": "also", "r": 4}, {"reselect": 3, "importance_batches": 2}], ids=str
)
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_plain_loop_that_is_resumed_is_the_one_that_was_not(config, step, tmp_path):
    whole = make(**config)
    expected = run_of(whole, 8)
    first = run_of(make(**config), step, tmp_path / "checkpoint")
    if step == 2 and "importance_batches" in config:
        saved = torch.load(tmp_path / "checkpoint", weights_only=True)["allocation"]
        assert saved["probe"][0]["passes"] == 1  # of two
    resumed = make(**config)
    assert first + run_of(resumed, 8, tmp_path / "checkpoint") == expected
    check_same(resumed, whole)


def test_what_is_no_allocation_is_refused_and_the_one_before_the_first_step_changes_nothing():
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = copy.deepcopy(model.peft_config["default"])
    model.base_model.resume_allocation(model.base_model.allocation_state_dict(), optimizer)
    assert model.peft_config["default"] == before and model.base_model.selection is None
    with pytest.raises(ValueError, match="takes what allocation_state_dict gave"):
        model.base_model.resume_allocation(model.state_dict(), optimizer)


def test_after_loading_all_have_a_place_in_an_optimizer_and_only_what_is_selected_is_trained():
    model = make_trained(rho=0.5, reselect=1, steps=6)
    config = model.peft_config["default"]
    new = make()
    new.load_state_dict(model.state_dict())
    values = [name for name, _ in model.named_parameters() if ".greentrainer_values." in name]
    assert [name for name, p in new.named_parameters() if p.requires_grad] == values
    selected = [name for name, p in model.named_parameters() if p.requires_grad and name in values]
    with torch.no_grad():
        new(**make_batch("llama"))
    assert [name for name, p in new.named_parameters() if p.requires_grad] == values
    new(**make_batch("llama")).loss.backward()
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        name
        for name in values
        if name.replace("base_model.model.", "").replace(".greentrainer_values.default", "") in config.selected
    }
    assert {name for name, p in new.named_parameters() if p.grad is not None} <= set(selected)


@pytest.mark.parametrize("config", [{}, {"low_rank": "also", "r": 4}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("step", [3, 4])
def test_an_optimizer_that_was_made_before_loading_is_kept_in_step(step, groups, config):
    def make_optimizer(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if groups == 1:
            return torch.optim.AdamW(parameters, lr=1e-2)
        norms, others = ([p for p in parameters if (p.dim() == 1) == one] for one in (True, False))
        return torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=1e-2)

    def go_on(model, optimizer, begin, end):
        losses = []
        for step in range(begin, end):
            loss = model(**make_batch("llama", seed=step)).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step, optimizer)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = make(**config)
    optimizer = make_optimizer(model)
    go_on(model, optimizer, 0, step)
    state, of_optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    of_allocator = json.loads(json.dumps(allocator_of(model.get_base_model()).state_dict()))
    expected = go_on(model, optimizer, step, 8)

    new = make(**config)
    optimizers = [make_optimizer(new)]
    for resumed, optimizer in ((new, optimizers[0]), (copy.deepcopy(model), None), (new, optimizers[0])):
        optimizer = optimizer or make_optimizer(resumed)  # of a model that has a probe before it
        resumed.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(of_optimizer))  # which keeps the tensors that it is given
        allocator_of(resumed.get_base_model()).resume(of_allocator, optimizer)
        assert go_on(resumed, optimizer, step, 8) == expected
        check_same(resumed, model)
        resumed.train()


def test_a_state_is_restored_in_the_middle_of_a_loop():
    model = make(reselect=3)
    loop = Loop(model).run(2)
    kept = copy.deepcopy(model.state_dict())
    expected = outputs(model, "llama")
    model.train()
    loop.run(5)
    model.load_state_dict(kept)
    assert torch.equal(outputs(model, "llama"), expected)
    model.train()
    in_groups = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for name, p in model.named_parameters() if "greentrainer_values" in name}
    loop.run(5)
    assert 0 < loop.selection.ratio <= 0.7
    selected = {name for name, p in model.named_parameters() if p.requires_grad and "greentrainer_values" in name}
    assert len(selected) == len(model.peft_config["default"].selected)


def test_accelerates_states(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepare():
        accelerate.state.AcceleratorState._reset_state(True)  # which a Trainer of another test has made
        model = make()
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    accelerator, model, optimizer = prepare()
    for step in range(5):
        accelerator.backward(model(**make_batch("llama", seed=step)).loss)
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    accelerator.save_state(tmp_path)
    other, new, other_optimizer = prepare()
    other.load_state(tmp_path)
    check_same(new, model)
    state, expected = (o.optimizer.state_dict()["state"] for o in (other_optimizer, optimizer))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[i]["exp_avg"], expected[i]["exp_avg"]) for i in state)


def fit(path, steps, checkpoint=None, kept=True):
    """A Lightning run; with `kept` the allocator's state is in its checkpoints too, made after each step's update."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Tuning(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = make(reselect=3).train(), []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

        def on_train_batch_end(self, outputs, batch, index):
            if not kept:
                self.model.base_model.update_and_allocate(self.global_step, self.optimizers().optimizer)

    class Allocation(
        lightning.Callback
    ):  # Lightning saves after all other callbacks, and before the module's own hook
        loaded = None

        def state_dict(self):
            return {"json": json.dumps(allocator_of(tuning.model.get_base_model()).state_dict())}

        def load_state_dict(self, state):
            self.loaded = json.loads(state["json"])

        def on_train_start(self, trainer, module):
            if self.loaded:
                allocator_of(module.model.get_base_model()).resume(self.loaded, trainer.optimizers[0])

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            module.model.base_model.update_and_allocate(trainer.global_step, trainer.optimizers[0])

    torch.manual_seed(0)
    tuning = Tuning()
    data = [{name: value[i] for name, value in make_batch("llama", rows=4).items()} for i in range(4)]
    saved = ModelCheckpoint(path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saved, Allocation()] if kept else [saved],
    )
    trainer.fit(tuning, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=checkpoint)
    return tuning


@pytest.mark.parametrize("kept", [False, True])
def test_lightning_resumes(kept, tmp_path):
    whole = fit(tmp_path, 12, kept=kept)
    checkpoint = str(tmp_path / "step=8.ckpt")
    new = make(reselect=3)
    nn.ModuleDict({"model": new}).load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    resumed = fit(tmp_path / "resumed", 12, checkpoint, kept)
    assert resumed.losses[0] == whole.losses[8]
    if kept:
        assert resumed.losses == whole.losses[8:]
        check_same(resumed.model, whole.model)
    assert set(new.peft_config["default"].tensors) <= set(resumed.model.peft_config["default"].tensors)


class Update(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        allocator_of(model.model.get_base_model()).update(state.global_step, optimizer)


def test_a_state_that_transformers_saves_of_a_container(tmp_path):
    def make_trainer(steps):
        rows = [{"input_ids": torch.arange(8) + i, "labels": torch.zeros(8, dtype=torch.long)} for i in range(4)]
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[]
        )
        return Trainer(Container(make()), arguments, train_dataset=rows, callbacks=[Update()])

    trainer = make_trainer(5)
    trainer.train()
    new = Container(make())
    new.load_state_dict(load_file(tmp_path / "checkpoint-5" / "model.safetensors"))
    check_same(new.model, trainer.model.model)
    assert not new.model.peft_config["default"].provisional
    resumed = make_trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert 0 < resumed.model.model.base_model.selection.ratio <= 0.7
    assert resumed.state.global_step == 8
