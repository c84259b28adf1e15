"""Where prompts and answers are: against loops over rows and tokens."""

import pytest
import torch

from peft_greentrainer.prompts.layout import IGNORED, Layout, reads_padding


def batch(padded, seed=0, rows=6, length=12):
    """Rows of random prompts and answers, some without the one or the other, turns of the prompt's in between."""
    choose = torch.Generator().manual_seed(seed)
    mask, labels = torch.zeros(2, rows, length, dtype=torch.long)
    labels += IGNORED
    for row in range(rows):
        count = int(torch.randint(2, length + 1, (), generator=choose))
        start = 0 if padded == "right" else length - count
        mask[row, start : start + count] = 1
        begins = int(torch.randint(0, count + 1, (), generator=choose))
        read = torch.randint(0, 2, (count - begins,), generator=choose)
        labels[row, start + begins : start + count] = torch.where(read > 0, 7, IGNORED)
    return labels, mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("padded", ["right", "left"])
def test_every_token_is_in_one_place_and_what_is_read_in_the_answers(padded, seed):
    labels, mask = batch(padded, seed)
    layout = Layout.of(labels, mask)
    for row in range(len(labels)):
        tokens = mask[row].nonzero()[:, 0].tolist()
        prompt = layout.prompt_index[row][layout.prompt_mask[row]].tolist()
        answer = layout.answer_index[row][layout.answer_mask[row]].tolist()
        assert prompt + answer == tokens
        read = [t for t in range(len(labels[row]) - 1) if labels[row, t + 1] != IGNORED and mask[row, t]]
        assert set(read) <= set(answer)
        reads_pad = any(labels[row, t + 1] != IGNORED and not mask[row, t] for t in range(len(labels[row]) - 1))
        assert reads_pad or not read or answer[0] == read[0]  # no token more than has to be
        assert reads_padding(labels[row : row + 1], mask[row : row + 1]) == reads_pad
    assert layout.prompt_mask.shape[1] == max(int(m.sum()) for m in layout.prompt_mask)
    assert layout.prompt_mask.sort(dim=1, stable=True).values.equal(layout.prompt_mask)  # padded on the left
    assert layout.joined_mask.sum() == mask.sum()


@pytest.mark.parametrize("padded", ["right", "left"])
def test_what_is_put_back_is_in_its_place(padded):
    labels, mask = batch(padded)
    layout = Layout.of(labels, mask)
    hidden = torch.randn(*labels.shape, 5)
    parts = [
        hidden.gather(1, index[..., None].expand(-1, -1, 5)) for index in (layout.prompt_index, layout.answer_index)
    ]
    parts[1].requires_grad_(True)
    whole = layout.put_back(*parts, labels.shape[1])
    assert torch.equal(whole.detach(), torch.where(mask[..., None] > 0, hidden, 0.0))
    (gradient,) = torch.autograd.grad(whole.sum(), parts[1])
    assert torch.equal(gradient.bool(), layout.answer_mask[..., None].expand_as(gradient))


def test_the_first_column_of_labels_is_never_read():
    layout = Layout.of(torch.tensor([[5, IGNORED, IGNORED, 7]]))
    assert layout.prompt_index.tolist() == [[0, 1]] and layout.answer_index.tolist() == [[2, 3]]


def test_rows_without_labels_are_prompt_and_rows_of_labels_answer():
    layout = Layout.of(torch.tensor([[IGNORED] * 3, [5, 6, 7]]))
    assert layout.prompt_mask.tolist() == [[True] * 3, [False] * 3]
    assert layout.answer_mask.tolist() == [[False] * 3, [True] * 3]
