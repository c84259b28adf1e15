"""Several processes: every rank selects the same tensors, and DistributedDataParallel synchronizes what was selected.

>>> importances = mean_over_ranks(importances)
>>> selection = from_first_rank(lambda: select(graph, importances, rho=0.5))

Without `torch.distributed` all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist


T = TypeVar("T")


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean over all ranks of each value; where a rank has none (an expert that it did not use), it counts as zero."""
    if not are_several():
        return values
    of_ranks = of_all_ranks(values)
    names = list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank))
    return {name: sum(of_rank.get(name, 0.0) for of_rank in of_ranks) / len(of_ranks) for name in names}


def of_all_ranks(value: T) -> list[T]:
    """The values of every rank, in order."""
    values = [value] * (dist.get_world_size() if are_several() else 1)
    if are_several():
        dist.all_gather_object(values, value)
    return values


def of_this_rank(values: list[T]) -> T:
    """The one of this rank; the first, where there are not so many."""
    rank = dist.get_rank() if are_several() else 0
    return values[rank if rank < len(values) else 0]


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` gives, or the `ValueError` that it raises, on rank 0: batches differ, and with them cost graphs."""
    if not are_several():
        return make()
    made: list[T | ValueError | None] = [None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except ValueError as error:
            made[0] = error
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], ValueError):
        raise made[0]
    return made[0]


def are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
