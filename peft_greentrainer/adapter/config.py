"""GreenTrainerConfig: what may be trained, under which budget, and when to choose again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional, Union, cast

from peft.config import PeftConfig
from peft.utils import PeftType

from ..tensors.forms import LowRankForm
from ..tensors.names import base_name


# Layout of adapter_model.safetensors and of the fields below that describe it. In 1 `unit` was called `budget`, and `low_rank`
# was the rank of what is "also" offered.
FORMAT_VERSION = 2


@dataclass
class GreenTrainerConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`GreenTrainerModel`].

        >>> config = GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM")
        >>> config = GreenTrainerConfig(rho=0.4, exclude_modules=["embed_tokens"], reselect="epoch")
        >>> config = GreenTrainerConfig(rho=0.7, low_rank="only")

    Args:
        rho (`float`):
            The budget: FLOPs of a training step over those of full fine-tuning, both with their forward pass. In (0,
            1]; 1.0 trains every candidate.
        unit (`str`):
            What `rho` is a share of: `"flops"`, or `"seconds"`, for which the operations of a few passes of their own
            are timed before each selection.
        reselect (`Union[int, str]`):
            When to choose the tensors again: after this many steps, `"epoch"` for every epoch, or `"once"`. The
            default is about the interval of the paper (two epochs of 498 steps).
        importance_batches (`int`):
            Over how many batches (forward and backward passes) the importance of a tensor is averaged.
        probe_batch_size (`int`, *optional*):
            Measure on the first rows of a batch only, in a pass of its own before the step. For those who can afford
            the memory of the budgeted step but not of a full one. Inputs whose rows do not correspond to those of the
            batch, such as the patches of all its images, are refused.
        low_rank (`Union[bool, str]`):
            `False`: whole tensors only, as in the paper. `"also"`: offer every linear tensor in two forms, of which
            one is selected at most: whole, or as a low-rank update of the rank `r`, as in LoRA. `"only"`: linear
            tensors as low-rank updates only, and those that are tied not at all. With low-rank forms importance is
            that of the update from one batch on the next, so that a probe takes one batch more.
        r (`int`):
            The rank of low-rank updates.
        low_rank_lr (`float`):
            The learning rate of low-rank updates, as a multiple of the optimizer's. It is part of what was saved: the
            factors in the file are stored in its terms.
        target_modules (`Union[list[str], str]`, *optional*):
            The modules whose tensors may be trained: a list of module names or a regular expression. Default: every
            module that owns floating-point parameters, without the tensors that did not require grad before the model
            was wrapped, unless none did.
        exclude_modules (`Union[list[str], str]`, *optional*):
            The modules whose tensors may not be trained: a list of module names or a regular expression. They still
            count in the cost of full fine-tuning.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            The layers whose tensors may be trained, by number. Not where `target_modules` is a regular expression.
        layers_pattern (`Union[list[str], str]`, *optional*):
            The name of the list of layers that `layers_to_transform` counts in, such as `"layers"` or `"h"`. Only
            works with `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved in any case, such as a new head. They count in the budget.
        trainable_token_indices:
            None: single rows of an embedding are not trained; put the embedding into `modules_to_save`. trl's trainers
            look for it, where a chat template adds tokens.
        init_weights (`bool`):
            Whether trained values start at the base tensors. `False` moves them a little, for tests only.
        format_version, frozen, tensors, selected, provisional, spent:
            Kept by the adapter: which tensors did not require grad before the model was wrapped, which have a trained
            value, with a fingerprint of the base tensor each, which are being trained, and what the training has cost.
    """

    rho: float = field(
        default=0.5,
        metadata={
            "help": (
                "The budget: FLOPs of a training step over those of full fine-tuning, both with their forward "
                "pass. In (0, 1]; 1.0 trains every candidate."
            )
        },
    )
    unit: str = field(
        default="flops",
        metadata={
            "help": (
                "What rho is a share of: 'flops', or 'seconds', for which the operations of a few passes of their "
                "own are timed before each selection."
            )
        },
    )
    reselect: Union[int, str] = field(
        default=1000,
        metadata={
            "help": (
                "When to choose the tensors again: after this many steps, 'epoch' for every epoch, or 'once'. The "
                "default is about the interval of the paper (two epochs of 498 steps)."
            )
        },
    )
    importance_batches: int = field(
        default=1,
        metadata={
            "help": ("Over how many batches (forward and backward passes) the importance of a tensor is averaged.")
        },
    )
    probe_batch_size: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "Measure on the first rows of a batch only, in a pass of its own before the step. For those who "
                "can afford the memory of the budgeted step but not of a full one. Inputs whose rows do not "
                "correspond to those of the batch, such as the patches of all its images, are refused."
            )
        },
    )
    low_rank: Union[bool, str] = field(
        default=False,
        metadata={
            "help": (
                "False: whole tensors only, as in the paper. 'also': offer every linear tensor in two forms, of "
                "which one is selected at most: whole, or as a low-rank update of the rank r, as in LoRA. 'only': "
                "linear tensors as low-rank updates only, and those that are tied not at all. With low-rank forms "
                "importance is that of the update from one batch on the next, so that a probe takes one batch "
                "more."
            )
        },
    )
    r: int = field(default=8, metadata={"help": ("The rank of low-rank updates.")})
    low_rank_lr: float = field(
        default=10.0,
        metadata={
            "help": (
                "The learning rate of low-rank updates, as a multiple of the optimizer's. It is part of what was "
                "saved: the factors in the file are stored in its terms."
            )
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "The modules whose tensors may be trained: a list of module names or a regular expression. "
                "Default: every module that owns floating-point parameters, without the tensors that did not "
                "require grad before the model was wrapped, unless none did."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "The modules whose tensors may not be trained: a list of module names or a regular expression. "
                "They still count in the cost of full fine-tuning."
            )
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={
            "help": (
                "The layers whose tensors may be trained, by number. Not where target_modules is a regular expression."
            )
        },
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "The name of the list of layers that layers_to_transform counts in, such as 'layers' or 'h'. Only "
                "works with layers_to_transform."
            )
        },
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": ("Modules that are trained and saved in any case, such as a new head. They count in the budget.")
        },
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": (
                "None: single rows of an embedding are not trained; put the embedding into modules_to_save. trl's "
                "trainers look for it, where a chat template adds tokens."
            )
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": ("Whether trained values start at the base tensors. False moves them a little, for tests only.")
        },
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Layout of the saved file. Kept by the adapter."}
    )
    frozen: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "The tensors that did not require grad before the model was first wrapped. Kept by the adapter."
        },
    )
    tensors: Optional[dict[str, Any]] = field(
        default=None,
        metadata={
            "help": (
                "The tensors that have a trained value, with a fingerprint of the base tensor each. Kept by the adapter."
            )
        },
    )
    selected: Optional[list[str]] = field(
        default=None, metadata={"help": "The tensors that are being trained. Kept by the adapter."}
    )
    provisional: bool = field(
        default=False,
        metadata={"help": "Whether `selected` was made from sizes alone, before any probe. Kept by the adapter."},
    )
    spent: Optional[dict[str, float]] = field(
        default=None,
        metadata={
            "help": "How many steps were trained, and how many of full fine-tuning they cost at most. Kept by the adapter."
        },
    )

    @property
    def form(self) -> LowRankForm:
        """How low-rank updates are made."""
        return LowRankForm(self.r, self.low_rank_lr)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> GreenTrainerConfig:
        """What peft makes a config of that was saved: fields of an earlier format get the names that they have now."""
        if kwargs.get("format_version") == 1:
            rank = kwargs["low_rank"]
            if rank != "only":
                kwargs |= {"low_rank": "also", "r": rank} if rank else {"low_rank": False}
            kwargs |= {"unit": kwargs.pop("budget", "flops"), "format_version": FORMAT_VERSION}
        saved: Any = super()  # which has no types
        return cast(GreenTrainerConfig, saved.from_peft_type(**kwargs))

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft gives it no types
        self.peft_type = PeftType("GREENTRAINER")
        self._was_used: bool = False  # for a model: adapters of several models may be made with one config
        _check(
            "rho", self.rho, _is_number(self.rho) and 0 < self.rho <= 1, "in (0, 1]: the share of a full step's cost"
        )
        _check("unit", self.unit, self.unit in ("flops", "seconds"), "'flops' or 'seconds'")
        often = self.reselect in ("epoch", "once") if isinstance(self.reselect, str) else _is_count(self.reselect)
        _check("reselect", self.reselect, often, "a positive number of steps, 'epoch' or 'once'")
        _check("importance_batches", self.importance_batches, _is_count(self.importance_batches), "a number from 1")
        rows = self.probe_batch_size
        _check("probe_batch_size", rows, rows is None or _is_count(rows), "a number of rows from 1, or None")
        _check("low_rank", self.low_rank, self.low_rank in (False, "also", "only"), "False, 'also' or 'only'")
        _check("low_rank_lr", self.low_rank_lr, _is_number(self.low_rank_lr) and self.low_rank_lr > 0, "positive")
        _check("r", self.r, _is_count(self.r), "a rank from 1")
        self.refuse_single_rows()
        if self.low_rank and self.unit == "seconds":
            raise ValueError(
                "What a low-rank form would take is known in FLOPs only: set unit='flops', or low_rank=False."
            )
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                _check_expression(name, patterns)
            elif patterns is not None:
                setattr(self, name, set(map(base_name, patterns)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: set layers_to_transform too.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                raise ValueError(
                    "layers_to_transform picks layers among the modules that target_modules names, and cannot do so with "
                    "a regular expression: name the layers in the expression, or make target_modules a list of names."
                )
        if self.modules_to_save is not None:
            # peft adds the heads of a task each time that a config is loaded.
            self.modules_to_save = list(dict.fromkeys(self.modules_to_save))
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This delta was saved in format {self.format_version}, and this version of peft-greentrainer reads up to "
                f"{FORMAT_VERSION}: pip install -U peft-greentrainer."
            )

    def forget_earlier_model(self) -> None:
        """Forget what belongs to the model that this config was used for before, if it was."""
        if self._was_used:
            self.frozen = self.tensors = self.selected = self.spent = None
            self.provisional = False
        self._was_used = True

    def refuse_single_rows(self) -> None:
        """Raise `ValueError` if rows of an embedding are to be trained; trl sets that after the config was made."""
        if self.trainable_token_indices is not None:
            raise ValueError(
                "trainable_token_indices would train single rows of an embedding, and GreenTrainer trains whole tensors: set "
                "it to None, and train embedding and head as they are with modules_to_save=['embed_tokens', 'lm_head'], by "
                "the names that they have in your model. If it was set by a trainer of trl, since a chat template adds "
                "tokens: call trl.clone_chat_template(model, tokenizer, path) yourself, give the trainer the model and the "
                "tokenizer that it returns, and no chat_template_path."
            )


def _check(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {expected}; got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}={expression!r} is no regular expression: {error}.") from None
