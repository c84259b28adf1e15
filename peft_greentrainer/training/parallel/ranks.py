"""Several processes: every rank selects the same tensors, and DistributedDataParallel synchronizes what was selected.

>>> importances = mean_over_ranks(importances)
>>> selection = run_on_first_rank(lambda: select(graph, importances, rho=0.5))

Without `torch.distributed` all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist


T = TypeVar("T")


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean over all ranks of each value; where a rank has none (an expert that it did not use), it counts as zero."""
    if not has_several_ranks():
        return values
    gathered = gather(values)
    names = list(dict.fromkeys(name for part in gathered for name in part))
    return {name: sum(part.get(name, 0.0) for part in gathered) / len(gathered) for name in names}


def gather(value: T) -> list[T]:
    """The values of every rank, in order."""
    values = [value] * (dist.get_world_size() if has_several_ranks() else 1)
    if has_several_ranks():
        dist.all_gather_object(values, value)
    return values


def own_part(gathered: list[T]) -> T:
    """Of what was gathered, that of this rank; that of the first, where there were not so many."""
    rank = dist.get_rank() if has_several_ranks() else 0
    return gathered[rank if rank < len(gathered) else 0]


def run_on_first_rank(make: Callable[[], T]) -> T:
    """What `make` gives, or the `ValueError` that it raises, on rank 0: batches differ, and with them cost graphs."""
    if not has_several_ranks():
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
    return cast(T, made[0])


def has_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
