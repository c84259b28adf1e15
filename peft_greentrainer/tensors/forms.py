"""The low-rank form of a linear tensor: `W + scale * B A`, trained at a learning rate of its own.

    >>> form = LowRankForm(rank=8, lr=10.0)
    >>> A, B = form.first_factor(in_features=576, seed=0), torch.zeros(192, form.rank)
    >>> output = linear(x) + LowRankUpdate()(x, A, B, form)

LoRA (Hu et al., 2021, section 4.1) wants a learning rate about ten times that of whole tensors. Schedulers keep a learning
rate for every parameter group that an optimizer had when they were made, and checkpoints of optimizers are loaded by
position, so groups of their own cannot be added while training runs. They are not needed: Adam and its kin move every
weight by about the learning rate, whatever the size of the gradient. A factor that is stored `lr` times too small, and
multiplied by `lr` where it is used, moves `lr` times as fast, in any loop and under any schedule. (SGD's step grows with the
gradient too: there the learning rate is multiplied by `lr` twice.)
"""

from __future__ import annotations

import math
import sys
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# The alpha of LoRA over its rank, as in most recipes.
ALPHA_PER_RANK = 2.0


@dataclass(frozen=True)
class LowRankForm:
    """Rank of the factors, and by how much their learning rate is higher than the optimizer's."""

    rank: int
    lr: float

    @property
    def scale(self) -> float:
        return ALPHA_PER_RANK * self.lr**2

    def first_factor(self, in_features: int, seed: int) -> Tensor:
        """`A` (rank, in) as LoRA draws it, over `lr`, the same for the same seed. On the CPU."""
        bound = 1 / (math.sqrt(in_features) * self.lr)
        factor = torch.empty(self.rank, in_features, device="cpu")
        return factor.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def has_low_rank_form(module: nn.Module) -> bool:
    """Whether the weight of a module has a low-rank form: an update of the module's output is then one of its weight.

        >>> has_low_rank_form(nn.Linear(2, 2)), has_low_rank_form(nn.Embedding(2, 2))
        (True, False)

    The module does what `F.linear` does, and nothing else: an `nn.Linear`, or the `Conv1D` of transformers, whose weight is
    transposed. A subclass with a forward pass of its own is neither.
    """
    forward_of_linear = [nn.Linear.forward]
    if "transformers.pytorch_utils" in sys.modules:  # else no module is a Conv1D
        forward_of_linear.append(sys.modules["transformers.pytorch_utils"].Conv1D.forward)
    return type(module).forward in forward_of_linear


class LowRankUpdate(nn.Module):
    """Runs the update. It has no parameters of its own."""

    def forward(self, x: Tensor, factor_a: Tensor, factor_b: Tensor, form: LowRankForm) -> Tensor:
        # Scaled before they are cast: in half precision their gradients are then no larger than those of LoRA.
        reduced = F.linear(x, (factor_a * (form.lr * ALPHA_PER_RANK)).to(x.dtype))
        return F.linear(reduced, (factor_b * form.lr).to(x.dtype))


def seed_of(tensor: str) -> int:
    """The seed of a tensor's factors: the same on all ranks and in a probe, another with another `torch.manual_seed`."""
    return (torch.initial_seed() ^ zlib.crc32(tensor.encode())) % 2**63
