"""What a probe measures on, where that is a part of each batch: its first rows, in a pass that takes less memory.

    >>> args, kwargs = FirstRows(2).cut((), {"input_ids": torch.zeros(4, 9), "position_ids": torch.zeros(1, 9)})
    >>> kwargs["input_ids"].shape, kwargs["position_ids"].shape
    (torch.Size([2, 9]), torch.Size([1, 9]))

What has an entry for each row is cut, what has one entry for all stays whole, and anything else is refused: cut wrongly or
passed whole it would be measured on other data than asked for, in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor


# Inputs whose first dimension is the batch in every model; the first of them tells how many rows there are.
OF_ROWS = ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "labels")
# What says how to run rather than on what, as a function does too.
OPTIONS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


@dataclass(frozen=True)
class FirstRows:
    """The first rows of every batch, for a `Probe`.

    Attributes:
        count: of the rows.
    """

    count: int

    def cut(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a model for the first rows of a batch only.

        How many rows the batch has is told by `input_ids`, `inputs_embeds`, `decoder_input_ids`, `attention_mask` or
        `labels`, wherever there is one, and by the first tensor where there is none. Tensors that have that first dimension
        are cut, and so are lists as long whose entries are not themselves tensors of so many rows. Tensors with a first
        dimension of 1 or without dimensions stay whole, and so do options.

        Raises:
            ValueError: an input whose rows do not correspond to those of the batch, such as the patches of all its images.
        """
        inputs = {**{f"the argument {number}": value for number, value in enumerate(args)}, **kwargs}
        batch_size = _rows_of(inputs)
        refused: list[str] = []
        cut = {name: _cut(name, value, batch_size, self.count, refused) for name, value in inputs.items()}
        if refused:
            raise ValueError(
                f"probe_batch_size={self.count} measures on the first rows of a batch, and this batch of {batch_size} has "
                f"inputs of which it is not known what belongs to these rows: {', '.join(refused)}. Set "
                "probe_batch_size=None, which measures in the step itself, on the whole batch; if that takes too much "
                "memory, make the batches smaller."
            )
        positional = list(cut.values())[: len(args)]
        return tuple(positional), {name: cut[name] for name in kwargs}

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Let an error in a pass on these rows say that it was one, unless it is about memory."""
        try:
            yield
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            raise ValueError(
                f"A pass on the first rows of a batch, for probe_batch_size={self.count}, ended in an error: "
                f"{type(error).__name__}: {error} If the whole batch runs without one, the inputs cannot be cut by rows: "
                "set probe_batch_size=None, which measures in the step itself, on the whole batch."
            ) from error


def _rows_of(inputs: Mapping[str, Any]) -> int:
    tensors = [(name, tensor) for name, tensor in _tensors(inputs) if tensor.dim() > 0]
    if not tensors:
        raise ValueError("probe_batch_size needs a model that takes tensors; set it to None.")
    of_rows = [tensor for known in OF_ROWS for name, tensor in tensors if name == known]
    return len(next(iter(of_rows), tensors[0][1]))


def _tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in these inputs, each with its own name."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, (list, tuple)):
            yield from _tensors({f"{name}[{number}]": entry for number, entry in enumerate(value)})


def _cut(name: str, value: Any, batch_size: int, rows: int, refused: list[str]) -> Any:
    """The first rows of an input; what cannot be cut is added to `refused`."""
    if isinstance(value, OPTIONS) or callable(value):
        return value
    if isinstance(value, Tensor):
        in_three = name == "position_ids" and value.dim() == 3  # of time, height and width, before the rows
        if value.dim() == 0 or len(value) == 1:
            return value
        if len(value) == batch_size and not in_three:
            return value[:rows]
        refused.append(f"{name} of shape {tuple(value.shape)}")
        return value
    if isinstance(value, MutableMapping):
        cut = copy.copy(value)
        for key, entry in value.items():
            cut[key] = _cut(f"{name}[{key!r}]", entry, batch_size, rows, refused)
        return cut
    if type(value) in (list, tuple):
        inside = [tensor for _, tensor in _tensors({name: value}) if tensor.dim() > 0]
        of_rows = any(len(tensor) == batch_size for tensor in inside)
        if len(value) == batch_size and (batch_size == 1 or not of_rows):
            return value[:rows]
        if len(value) != batch_size and (of_rows or not inside):
            entries = enumerate(value)
            return type(value)(_cut(f"{name}[{at}]", entry, batch_size, rows, refused) for at, entry in entries)
        refused.append(f"{name}, {len(value)} entries with tensors of shapes {[tuple(t.shape) for t in inside][:4]}")
        return value
    refused.append(f"{name}, a {type(value).__name__}")
    return value
