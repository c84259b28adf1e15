"""GreenTrainerConfig: what may be trained, under which budget, and when to choose again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType


# Layout of adapter_model.safetensors and of the fields below that describe it.
FORMAT_VERSION = 1


@dataclass
class GreenTrainerConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`GreenTrainerModel`].

        >>> config = GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM")
        >>> config = GreenTrainerConfig(rho=0.4, exclude_modules=["embed_tokens"], reselect="epoch")

    Args:
        rho (`float`):
            The budget: FLOPs of a training step over those of full fine-tuning, both with their forward pass. In
            (0, 1]; 1.0 trains every candidate.
        budget (`str`):
            What `rho` is a share of: `"flops"`, or `"seconds"`, for which operations are timed before each selection.
        reselect (`Union[int, str]`):
            When to choose the tensors again: after this many steps, `"epoch"` for every epoch, or `"once"`.
        importance_batches (`int`):
            Over how many batches (forward and backward passes) the importance of a tensor is averaged.
        probe_batch_size (`int`, *optional*):
            Measure on the first rows of a batch only, in a pass of its own before the step. For those who can afford
            the memory of the budgeted step but not of a full one.
        target_modules (`Union[list[str], str]`, *optional*):
            The modules whose tensors may be trained: a list of names or a regular expression. Default: every module
            that owns floating-point parameters.
        exclude_modules (`Union[list[str], str]`, *optional*):
            The modules whose tensors may not be trained. They still count in the cost of full fine-tuning.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved in any case, such as a new head. They count in the budget.
        init_weights (`bool`):
            Whether trained values start at the base tensors. `False` moves them a little, for tests only.
        format_version, tensors, selected, provisional:
            Kept by the adapter: which tensors have a trained value, with a fingerprint of the base tensor each, and
            which are being trained.
    """

    rho: float = field(
        default=0.5,
        metadata={
            "help": (
                "The budget: FLOPs of a training step over those of full fine-tuning, both with their forward pass. In "
                "(0, 1]; 1.0 trains every candidate."
            )
        },
    )
    budget: str = field(
        default="flops",
        metadata={
            "help": (
                "What rho is a share of: 'flops', or 'seconds', for which every operation of a few passes of their own "
                "is timed before each selection."
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
            "help": "Over how many batches (forward and backward passes) the importance of a tensor is averaged."
        },
    )
    probe_batch_size: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "Measure on the first rows of a batch only, in a pass of its own before the step. For those who can "
                "afford the memory of the budgeted step but not of a full one."
            )
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "The modules whose tensors may be trained: a list of module names or a regular expression. Default: "
                "every module that owns floating-point parameters."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "The modules whose tensors may not be trained: a list of module names or a regular expression. They "
                "still count in the cost of full fine-tuning."
            )
        },
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": ("Modules that are trained and saved in any case, such as a new head. They count in the budget.")
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether trained values start at the base tensors. False moves them a little, for tests only."
        },
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Layout of the saved file. Kept by the adapter."}
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

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.GREENTRAINER
        if not 0 < self.rho <= 1:
            raise ValueError(
                f"rho must be in (0, 1], the share of a full fine-tuning step that a step may cost; got {self.rho}."
            )
        if self.budget not in ("flops", "seconds"):
            raise ValueError(f"budget must be 'flops' or 'seconds'; got {self.budget!r}.")
        if self.reselect not in ("epoch", "once") and not (isinstance(self.reselect, int) and self.reselect > 0):
            raise ValueError(f"reselect must be a positive number of steps, 'epoch' or 'once'; got {self.reselect!r}.")
        if self.importance_batches < 1:
            raise ValueError(f"importance_batches must be at least 1; got {self.importance_batches}.")
        if self.probe_batch_size is not None and self.probe_batch_size < 1:
            raise ValueError(f"probe_batch_size must be at least 1 row, or None; got {self.probe_batch_size}.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This delta was saved in format {self.format_version}, and this version of peft-greentrainer reads up to "
                f"{FORMAT_VERSION}: pip install -U peft-greentrainer."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
