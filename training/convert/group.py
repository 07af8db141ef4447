"""Who takes part in a conversion: threads of this process, and other processes that torchrun started.

Work is cut into pieces that do not depend on how many take part, and what the pieces give is put together exactly, so
any number of workers makes the same bits.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Group:
    """This process among its peers.

    Attributes:
        rank: its number, from 0.
        size: how many processes there are; 1: no other.
        workers: threads of this process that work at the same time, each on its own piece.
    """

    rank: int = 0
    size: int = 1
    workers: int = 1

    @classmethod
    def here(cls, workers: int = 1) -> "Group":
        """The processes of torch.distributed if it is initialised, otherwise this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), workers)
        return cls(workers=workers)

    def mine(self, count: int) -> range:
        """Which of so many pieces are this process's: every size-th, from its rank on."""
        return range(self.rank, count, self.size)

    def add(self, total: Tensor) -> Tensor:
        """The elementwise sum over all processes, in place: int64, hence exact."""
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def largest(self, value: float, device: torch.device) -> float:
        """The maximum over all processes."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)

    def exchange(self, pieces: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
        """Give everybody all pieces.

        Args:
            pieces: those that are `mine`, on this process's device; `None` elsewhere.
            device: of this process, where the others' pieces shall be.
        """
        if self.size == 1:
            return [piece for piece in pieces if piece is not None]
        held: list[list[Tensor | None]] = [[] for _ in range(self.size)]
        # A tensor arrives on the device that it was sent from, which is another process's.
        dist.all_gather_object(held, [None if piece is None else piece.cpu() for piece in pieces])
        found = (held[index % self.size][index] for index in range(len(pieces)))
        return [piece.to(device) for piece in found if piece is not None]

    def each(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Apply a function to items, `workers` at a time; results in the order of the items."""
        if self.workers == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(work, items))
