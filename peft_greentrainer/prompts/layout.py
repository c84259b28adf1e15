"""Where the prompts and the answers of a batch are.

    >>> layout = Layout.of(labels=torch.tensor([[-100, -100, -100, 7], [-100, 5, 6, -100]]))
    >>> layout.prompt_mask                            # the last prompt token is read: it belongs to the answer
    tensor([[ True,  True],
            [False, False]])
    >>> layout.answer_index
    tensor([[2, 3, 0, 0],
            [0, 1, 2, 3]])

In each row the *prompt* is what stands before the first token whose output the loss reads; the *answer* is the rest, later
turns included. The loss reads the output of the token before each label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


# What the losses of transformers leave out.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Layout:
    """The places of prompts and answers in a batch of B rows and T tokens.

    Attributes:
        prompt_index: (B, P) int64, for each place among the prompts the token of its row. Rows are padded on the left.
        prompt_mask: (B, P) bool, which of them hold a token.
        answer_index: (B, A) int64, the same of the answers, which are padded on the right.
        answer_mask: (B, A) bool.
    """

    prompt_index: Tensor
    prompt_mask: Tensor
    answer_index: Tensor
    answer_mask: Tensor

    @classmethod
    def of(cls, labels: Tensor, attention_mask: Tensor | None = None) -> Layout:
        """Find prompts and answers.

        Args:
            labels: (B, T) int64, -100 where there is none. The first column is never read.
            attention_mask: (B, T), zero where there is no token; None: there are tokens everywhere.
        """
        tokens = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        read = (labels[:, 1:] != IGNORED).long()
        # Of a row without labels everything is prompt.
        begins = torch.where(read.any(dim=1), read.argmax(dim=1), labels.shape[1])
        is_prompt = torch.arange(labels.shape[1], device=labels.device) < begins[:, None]
        prompt_index, prompt_mask = _gathered(tokens & is_prompt, padded_left=True)
        return cls(prompt_index, prompt_mask, *_gathered(tokens & ~is_prompt, padded_left=False))

    @property
    def joined_mask(self) -> Tensor:
        """(B, P + A) int64, the attention mask of prompts and answers side by side."""
        return torch.cat([self.prompt_mask, self.answer_mask], dim=1).long()

    def put_back(self, prompts: Tensor, answers: Tensor, length: int) -> Tensor:
        """(B, P, ...) and (B, A, ...), each in its place of (B, length, ...): zero where there is no token."""
        whole = answers.new_zeros(len(answers), length, *answers.shape[2:])
        for part, index, mask in (
            (prompts, self.prompt_index, self.prompt_mask),
            (answers, self.answer_index, self.answer_mask),
        ):
            rows, _ = mask.nonzero(as_tuple=True)
            whole = whole.index_put((rows, index[mask]), part[mask].to(whole.dtype))
        return whole


def reads_padding(labels: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the loss reads the output of a place that holds no token: the one before a row, which is padded on the left.

    >>> reads_padding(torch.tensor([[-100, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]]))
    True
    """
    if attention_mask is None:
        return False
    return bool(((labels[:, 1:] != IGNORED) & (attention_mask[:, :-1] == 0)).any())


def _gathered(chosen: Tensor, padded_left: bool) -> tuple[Tensor, Tensor]:
    """The columns that are chosen in each row of (B, T), side by side, and which places hold one."""
    width = int(chosen.sum(dim=1).max())
    order = torch.argsort(chosen.long(), dim=1, stable=True, descending=not padded_left)
    places = slice(chosen.shape[1] - width, None) if padded_left else slice(width)
    index = order[:, places]
    return index, chosen.gather(1, index)
