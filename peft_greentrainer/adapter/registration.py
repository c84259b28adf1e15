"""Makes peft know the type GREENTRAINER. Importing the package is enough; importing it again is harmless."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method


NAME = "greentrainer"
# Where a patched method keeps the one of peft, for the next import.
OF_PEFT = "of_peft"


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


def register(config_cls: type, model_cls: type) -> None:
    """Register the classes with peft, in place of those of an earlier import."""
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(PeftType(NAME.upper()), None)
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=False)


def register_card(describe: Callable[[PeftModel, str], None]) -> None:
    """Let `describe(model, folder)` complete each model card that peft writes, in place of that of an earlier import.

    Two methods of `PeftModel` are patched, for all peft methods; `describe` leaves the cards of others as they are. peft has
    no place for a method's own words, and a Trainer rewrites the card after each save. On an upload transformers puts the
    card of an empty model in place of the one that was saved, so there it is written again.
    """
    write_card = getattr(PeftModel.create_or_update_model_card, OF_PEFT, PeftModel.create_or_update_model_card)
    upload = getattr(PeftModel._upload_modified_files, OF_PEFT, PeftModel._upload_modified_files)

    @functools.wraps(write_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write_card(self, output_dir)
        describe(self, output_dir)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type is PeftType(NAME.upper()) for config in self.peft_config.values()):
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    for patched, of_peft in ((create_or_update_model_card, write_card), (_upload_modified_files, upload)):
        setattr(patched, OF_PEFT, of_peft)
        setattr(PeftModel, patched.__name__, patched)
