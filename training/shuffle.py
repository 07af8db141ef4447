"""The order of training samples."""

# S = samples, B = samples in a batch

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

_POOL = 16  # batches that are sorted together: less padding, and still another mixture in every epoch


class Shuffle(Sampler[int]):
    """A new order each epoch that depends on the seed and the epoch alone: a resumed run sees the same.

    Args:
        size: S.
        seed: of all orders.
        batch_size: B, of the loader.
        lengths: (S,), of samples that are padded to the longest of their batch: samples of similar length then share a
            batch. None: all samples are alike.

    Attributes:
        epoch: whose order comes next, from 0.
    """

    def __init__(self, size: int, seed: int, batch_size: int, lengths: Tensor | None = None) -> None:
        self.size, self.seed, self.batch_size, self.lengths, self.epoch = size, seed, batch_size, lengths, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        if self.lengths is not None:
            order = self._grouped(order, self.lengths, generator)
        yield from order.tolist()

    def _grouped(self, order: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        whole = self.size // self.batch_size * self.batch_size  # what fills no batch stays at the end
        pools = order[:whole].split(_POOL * self.batch_size)
        batches = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools]).reshape(-1, self.batch_size)
        return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), order[whole:]])
