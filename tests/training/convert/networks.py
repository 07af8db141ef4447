"""Small networks, their inputs, and checks that know nothing of the code under test."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection

ALL = Selection(keep_last=False)


def mlp(seed: int = 0) -> nn.Sequential:
    """16 -> 24 -> 24 -> 8; layers 0, 2, 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def conv_net() -> nn.Sequential:
    """Images (4, 16, 16) -> 4; convolutions 0 (then batch norm 1) and 3, Linear 5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, dilation=2),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 4),
        )


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it runs them; one never runs, one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.idle = nn.Linear(8, 8)
            self.last = nn.Linear(8, 8)
            self.twice = nn.Linear(8, 8)
            self.first = nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        h = self.relu(self.twice(h))
        h = self.relu(self.twice(input=h))
        result: Tensor = self.last(h)
        return result


def vectors(count: int = 3, seed: int = 0, width: int = 16, examples: int = 64) -> list[Tensor]:
    """Batches (examples, width) whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(examples, width, generator=generator) + 0.5 for _ in range(count)]


def images(count: int = 2, seed: int = 0) -> list[Tensor]:
    """Batches (16, 4, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, 16, 16, generator=generator) for _ in range(count)]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Of a layer, detached."""
    return model.get_submodule(name).get_parameter("weight").detach()


def bias_of(model: nn.Module, name: str) -> Tensor:
    """Of a layer, detached."""
    return model.get_submodule(name).get_parameter("bias").detach()


def violations(weight: Tensor, pattern: Pattern) -> int:
    """Groups with more than N non-zeros, counted one by one; for a transposable pattern also down the columns.

    The GEMM matrix of a convolution is built entry by entry: its columns are kernel positions, channels fastest.
    """
    rows = [_gemm_row(row) for row in weight]
    count = _count(rows, pattern)
    if pattern.transposable:
        count += _count([[row[column] for row in rows] for column in range(len(rows[0]))], pattern)
    return count


def _gemm_row(row: Tensor) -> list[bool]:
    if row.dim() == 1:
        return [value != 0 for value in row.tolist()]
    channels, height, width = row.shape
    values = row.tolist()
    return [values[c][h][w] != 0 for h in range(height) for w in range(width) for c in range(channels)]


def _count(rows: Sequence[Sequence[bool]], pattern: Pattern) -> int:
    starts = range(0, len(rows[0]), pattern.m)
    return sum(sum(row[start : start + pattern.m]) > pattern.n for row in rows for start in starts)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold exactly the same parameters and buffers."""
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())
