"""The networks of gpu_export.py: random weights, dense or pruned to 2:4, and what they are asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

PATTERN = Pattern(2, 4)


@dataclass(frozen=True)
class Network:
    """One network of the benchmark.

    Attributes:
        name: Of its rows.
        make: The dense one, always the same.
        sample: One sample of its input, without the batch.
        batches: Batch sizes to time.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batches: tuple[int, ...]

    def dense(self) -> nn.Module:
        """In eval mode, with the same random weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def sparse(self) -> nn.Module:
        """The same with every weight pruned to 2:4 whose rows are whole groups."""
        network = self.dense()
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[1] % PATTERN.m == 0:
                layer.weight.data.mul_(solve(layer.weight, PATTERN))
        return network

    def inputs(self, batch: int) -> Tensor:
        """Gaussian, the same at every call."""
        return torch.randn(batch, *self.sample, generator=torch.Generator().manual_seed(batch))


class Residual(nn.Module):
    """A basic block of ResNet."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if channels == outputs else 2
        self.first = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        hidden = F.relu(self.norms[0](self.first(images)))
        added: Tensor = self.norms[1](self.second(hidden)) + self.shortcut(images)
        return F.relu(added)


class Encoder(nn.Module):
    """A layer of BERT: tokens of a width in, as many out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        split = [
            part(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2).flatten(2)
        hidden = self.norms[0](tokens + self.mix(attended))
        answer: Tensor = self.norms[1](hidden + self.narrow(F.gelu(self.widen(hidden))))
        return answer


def products(width: int, layers: int = 4) -> nn.Module:
    """Nothing but matrix products."""
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))


def residual(widths: tuple[int, ...]) -> nn.Module:
    """A stem of 3 channels, which is never eligible, two blocks of each width, a head."""
    stages = [
        block
        for before, width in zip((widths[0], *widths), widths, strict=False)
        for block in (Residual(before, width), Residual(width, width))
    ]
    stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
    return nn.Sequential(stem, nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))


def networks(*, quick: bool) -> list[Network]:
    """What is timed: on a GPU layers as wide as they are in use, quickly a small one of each kind."""
    if quick:
        return [
            Network("products 64", lambda: products(64, 2), (64,), (1, 8)),
            Network("residual", lambda: residual((16, 32)), (3, 32, 32), (1, 2)),
            Network("encoder", lambda: Encoder(64, 4), (16, 64), (1, 2)),
        ]
    # A product of a few rows waits for its weights, one of many for its arithmetic: hence the large batch.
    wide = [
        Network(f"products {width}", partial(products, width), (width,), (1, 8, 64, 2048))
        for width in (256, 512, 1024, 2048, 4096)
    ]
    return [
        *wide,
        Network("residual", lambda: residual((64, 128, 256, 512)), (3, 112, 112), (1, 8, 64)),
        Network("encoder", lambda: Encoder(768, 12), (128, 768), (1, 8, 64)),
    ]
