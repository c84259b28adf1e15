"""When a selection is due."""

import pytest
import torch
from helpers.loop import Loop
from helpers.models import make_model
from peft import get_peft_model

from peft_greentrainer import GreenTrainerConfig
from peft_greentrainer.training.allocator import allocator_of
from peft_greentrainer.training.schedule import Schedule


@pytest.mark.parametrize("interval", [1, 2, 1000])
def test_in_steps_the_probe_is_the_last_one_of_the_interval(interval):
    schedule = Schedule.from_setting(interval)
    due = [schedule.is_due(schedule.count(step, epoch=None), last=7) for step in range(7, 7 + 2 * interval)]
    assert due == [step + 1 >= 7 + interval for step in range(7, 7 + 2 * interval)]
    assert schedule.count(step=3, epoch=9) == 3


def test_in_epochs_it_is_due_as_the_next_one_has_begun():
    schedule = Schedule.from_setting("epoch")
    assert [schedule.is_due(schedule.count(step=100, epoch=epoch), last=2) for epoch in (2, 3, 4)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(ValueError, match=r"epoch=epoch.*number of steps"):
        schedule.count(step=100, epoch=None)


def test_once_is_never_due_again():
    schedule = Schedule.from_setting("once")
    assert not schedule.is_due(schedule.count(step=10**12, epoch=None), last=0)


def test_a_training_that_begins_with_a_selection_counts_epochs_from_its_own_first():
    model = get_peft_model(make_model("llama"), GreenTrainerConfig(rho=0.6, reselect="epoch"))
    loop = Loop(model, make_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    for _ in range(2):
        loop.step(epoch=0)
    first, allocator = loop.selection, allocator_of(model.get_base_model())
    assert first is not None
    allocator.begin(2, loop.optimizer, epoch=3)  # the steps, two of them, are no epochs
    loop.step(epoch=3)
    loop.step(epoch=3)
    assert loop.selection is first
    loop.step(epoch=4)
    loop.step(epoch=4)
    assert loop.selection is not first
