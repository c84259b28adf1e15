"""A cache that was filled by the prompts, and is read by the answers.

    >>> output = backbone(input_ids=prompts, use_cache=True)
    >>> let_only_read(output.past_key_values)
    >>> backbone(input_ids=answers, past_key_values=output.past_key_values)     # keys of both are joined, and nothing is stored

What a training step stores for later calls it would store for nothing. State-space layers write their states in place besides,
over what a backward pass still needs.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor


# What layers of a cache are told of new tokens by.
UPDATES = ("update", "update_conv_state", "update_recurrent_state")


def let_only_read(cache: Any) -> None:
    """Let the layers of a cache of transformers give the joined states as ever, and stay as they are."""
    for layer in cache.layers:
        for name in UPDATES:
            if hasattr(layer, name):
                setattr(layer, name, partial(_update_a_copy, layer, name))


def _update_a_copy(layer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    twin = copy.copy(layer)
    for update in UPDATES:
        vars(twin).pop(update, None)
    for attribute, value in vars(layer).items():
        if isinstance(value, dict):  # of states, by number, which are written in place
            states = {key: state.clone() if isinstance(state, Tensor) else state for key, state in value.items()}
            setattr(twin, attribute, states)
    return getattr(twin, name)(*args, **kwargs)
