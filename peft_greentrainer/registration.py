"""Makes peft know the type GREENTRAINER. Importing the package is enough; importing it again is harmless."""

from __future__ import annotations

import functools
from collections.abc import Callable

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method


NAME = "greentrainer"


def add_peft_type() -> None:
    """Add the member GREENTRAINER to peft's `PeftType`, which has no place for methods from outside."""
    if NAME.upper() in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME.upper())
    member._name_ = member._value_ = NAME.upper()
    PeftType._member_names_.append(member.name)
    PeftType._member_map_[member.name] = member
    PeftType._value2member_map_[member.value] = member
    type.__setattr__(PeftType, member.name, member)


def register(config_cls: type, model_cls: type, describe: Callable[[PeftModel, str], None]) -> None:
    """Register the classes with peft, and what describes their adapters in a model card, in place of an earlier import."""
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(PeftType.GREENTRAINER, None)
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=False)

    # peft has no place for a method's own words in the card, and rewrites the card after each save of a Trainer.
    write_card = getattr(PeftModel.create_or_update_model_card, "of_peft", PeftModel.create_or_update_model_card)

    @functools.wraps(write_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write_card(self, output_dir)
        describe(self, output_dir)

    create_or_update_model_card.of_peft = write_card
    PeftModel.create_or_update_model_card = create_or_update_model_card
