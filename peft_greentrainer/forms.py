"""The names of the two forms in which a linear tensor can be trained: whole, or as a low-rank update.

    >>> low_rank_form("layers.0.q_proj.weight")       # the candidate beside the whole tensor
    'layers.0.q_proj.weight_low_rank'
    >>> factors("layers.0.q_proj.weight_low_rank")    # the parameters that it trains
    ('layers.0.q_proj.weight_low_rank_A', 'layers.0.q_proj.weight_low_rank_B')

The low-rank form of a tensor `W` (out, in) adds `scale * B A` to it, with `A` (rank, in) and `B` (out, rank), as LoRA does
(Hu et al., 2021, section 4.1).
"""

from __future__ import annotations


LOW_RANK = "_low_rank"
FACTORS = ("_A", "_B")


def low_rank_form(tensor: str) -> str:
    """The candidate that stands for a low-rank update of this tensor."""
    return tensor + LOW_RANK


def is_low_rank(candidate: str) -> bool:
    return candidate.endswith(LOW_RANK)


def tensor_of(name: str) -> str:
    """The tensor that a candidate, or a parameter of one, trains in whichever form."""
    return candidate_of(name).removesuffix(LOW_RANK)


def factors(candidate: str) -> tuple[str, str]:
    """The two parameters of a low-rank candidate."""
    return candidate + FACTORS[0], candidate + FACTORS[1]


def candidate_of(parameter: str) -> str:
    """The candidate that a parameter belongs to: a factor to a low-rank form, any other to the whole tensor.

    >>> candidate_of("q_proj.weight"), candidate_of("q_proj.weight_low_rank_B")
    ('q_proj.weight', 'q_proj.weight_low_rank')
    """
    form = parameter[: -len(FACTORS[0])]
    return form if parameter.endswith(FACTORS) and is_low_rank(form) else parameter
