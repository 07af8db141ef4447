"""The exact transposable 2:4 mask of every 4x4 block, by ten candidates in plain tensor ops.

See the four rows as two halves (rows 0, 1 and rows 2, 3). Each of the 90 masks with two kept per row
and column falls into one of ten classes, told by where each column's two kept weights lie:

- one column wholly in the top half, one wholly in the bottom half, the other two split between the
  halves (6 classes: the pair of split columns);
- two columns wholly in the top half, two wholly in the bottom half (3 classes: how the columns pair up);
- every column split (1 class: each half picks its own pair of columns for its first row).

Within a class the rows and the halves decide independently, so its best mask is a sum of small maxima.
Nothing is iterated and nothing branches: the ten lines below run on any device, in one pass.

Shape legend: B = blocks, P = the 6 pairs of columns, C = the 10 candidates.
"""

import torch
from torch import Tensor

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_COMPLEMENT = 5  # the pair of the other two columns of pair p is 5 - p


def solve_2_4(blocks: Tensor) -> Tensor:
    """The mask with exactly two kept in every row and column that keeps the largest sum, for each block.

    Args:
        blocks: (B, 4, 4), non-negative, float32 or float64.

    Returns:
        (B, 4, 4) bool. Ties go to the first candidate, so thread counts do not change the result.
    """
    first = torch.tensor([b for b, _ in _PAIRS], device=blocks.device)
    second = torch.tensor([c for _, c in _PAIRS], device=blocks.device)
    halves = blocks.reshape(-1, 2, 2, 4)  # (B, half, row of the half, column)
    one = halves[:, :, 0, first] + halves[:, :, 1, second]  # (B, half, P): row 0 takes b, row 1 takes c
    other = halves[:, :, 0, second] + halves[:, :, 1, first]
    split = torch.maximum(one, other)
    sums = halves.sum(2)  # (B, half, column)
    upright = sums[:, 0, first] + sums[:, 1, second]  # (B, P): column b wholly on top, c wholly at the bottom
    swapped = sums[:, 0, second] + sums[:, 1, first]
    whole = torch.maximum(upright, swapped)
    crossed = split + split.flip(2)  # (B, half, P): row 0 takes one of p and one of its complement, row 1 the rest

    candidates = torch.cat(
        [
            split[:, 0] + split[:, 1] + whole.flip(1),  # 6: pair p split in both halves, its complement whole
            (whole + whole.flip(1))[:, :3],  # 3: every column whole
            crossed.amax(2).sum(1, keepdim=True),  # 1: every column split
        ],
        dim=1,
    )
    return _mask_of(candidates.argmax(1), one >= other, upright >= swapped, crossed[:, :, :3].argmax(2))


def _mask_of(choice: Tensor, one_wins: Tensor, upright_wins: Tensor, crossing: Tensor) -> Tensor:
    """Write out the masks of the chosen candidates.

    Args:
        choice: (B,) index into the ten candidates.
        one_wins: (B, 2, P) whether row 0 of the half takes the first column of the pair.
        upright_wins: (B, P) whether the first column of the pair lies in the top half.
        crossing: (B, 2) for candidate 9, the pair (of the first three) that each half splits first.

    Returns:
        (B, 4, 4) bool.
    """
    count = choice.shape[0]
    device = choice.device
    pair_columns = torch.zeros(6, 4, dtype=torch.bool, device=device)
    first_column = torch.zeros(6, 4, dtype=torch.bool, device=device)
    for index, (b, c) in enumerate(_PAIRS):
        pair_columns[index, [b, c]] = True
        first_column[index, b] = True
    second_column = pair_columns & ~first_column

    def split_rows(pair: Tensor, half: int) -> Tensor:
        """(B, 2, 4): row 0 keeps one column of the pair and row 1 the other."""
        wins = one_wins[:, half].gather(1, pair[:, None])
        row = torch.where(wins, first_column[pair], second_column[pair])
        return torch.stack([row, pair_columns[pair] & ~row], dim=1)

    def whole_half(pair: Tensor, half: int) -> Tensor:
        """(B, 2, 4): both rows keep the column of the pair that lies in this half."""
        on_first = upright_wins.gather(1, pair[:, None]) == (half == 0)
        row = torch.where(on_first, first_column[pair], second_column[pair])
        return row[:, None].expand(count, 2, 4)

    halves = []
    for half in range(2):
        p = choice.clamp(max=5)
        mixed = split_rows(p, half) | whole_half(_COMPLEMENT - p, half)
        q = (choice - 6).clamp(0, 2)
        columns = whole_half(q, half) | whole_half(_COMPLEMENT - q, half)
        r = crossing[:, half]
        crossed = split_rows(r, half) | split_rows(_COMPLEMENT - r, half)
        kind = choice[:, None, None]
        halves.append(torch.where(kind < 6, mixed, torch.where(kind < 9, columns, crossed)))
    return torch.cat(halves, dim=1)
