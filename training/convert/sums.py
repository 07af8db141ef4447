"""Sums that come out the same in any order: over batches, over threads, over machines.

Floating-point addition rounds, so its result depends on the order, and with several workers the order is chance. Here
each term is rounded once, to a multiple of one unit that is fixed beforehand; multiples of a unit add up exactly in
int64.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import frexp

import torch
from torch import Tensor

from tnm_pipeline.training.convert.group import Group

_MOST = 1000  # so that its power of two is a float64
_BITS = 62  # of an int64, without the sign and one for rounding
_ENTRIES_AT_ONCE = 1 << 16  # converted in the cache of a CPU
COLUMNS_AT_ONCE = 128  # of a gram matrix


class ExactSum:
    """Adds float tensors of one shape in fixed point.

    The unit is 2^-62 of the bound on the total, so a total near the bound is as exact as float64, and smaller ones lose
    relative precision like the small entries of any fixed-point number.
    """

    def __init__(self, shape: tuple[int, ...], bound: float, device: torch.device) -> None:
        """Start at zero.

        Args:
            shape: of the terms.
            bound: no entry of the total, nor of any part of it, exceeds this in absolute value.
            device: of the terms.
        """
        self._exponent = min(_BITS - frexp(bound)[1], _MOST) if bound > 0 else 0
        self._total = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, term: Tensor, first: int = 0) -> None:
        """Add a term, of any float dtype, finite.

        Args:
            term: of the shape of the total, or fewer entries.
            first: the entry of the flattened total that its first one is added to.
        """
        unit = 2.0**self._exponent
        size = _ENTRIES_AT_ONCE if term.device.type == "cpu" else max(1, term.numel())
        flat = self._total.flatten()[first : first + term.numel()]
        for total, part in zip(flat.split(size), term.flatten().split(size), strict=True):
            total += part.to(torch.float64, copy=True).mul_(unit).round_().to(torch.int64)

    def total(self, group: Group) -> Tensor:
        """The sum over all processes of the group: float64."""
        return group.add(self._total).double().mul_(2.0**-self._exponent)

    def parts(self, group: Group, bounds: Sequence[int]) -> Iterator[Tensor]:
        """The same, flat and piece by piece, so that it is not in memory twice.

        Args:
            group: the processes.
            bounds: the first entry of each piece, and the number of all entries.
        """
        total = group.add(self._total).flatten()
        for first, last in pairwise(bounds):
            yield total[first:last].double().mul_(2.0**-self._exponent)


class ExactGram:
    """Adds X^T X in fixed point, blocks on and above the diagonal only: half of the products, sums and memory."""

    def __init__(self, width: int, bound: float, device: torch.device) -> None:
        """Start at zero.

        Args:
            width: K, of the matrices X.
            bound: as of `ExactSum`.
            device: of the matrices.
        """
        self._width, self._device = width, device
        self._columns = [slice(at, min(at + COLUMNS_AT_ONCE, width)) for at in range(0, width, COLUMNS_AT_ONCE)]
        sizes = [part.stop * (part.stop - part.start) for part in self._columns]
        self._first = list(accumulate(sizes, initial=0))
        # in one piece: many small ones would leave holes in the heap
        self._sum = ExactSum((self._first[-1],), bound, device)
        self._lock = threading.Lock()

    def add(self, x: Tensor) -> None:
        """Add the products of (S, K) float rows; from any thread."""
        for part, first in zip(self._columns, self._first, strict=False):
            product = x[:, : part.stop].T @ x[:, part]
            with self._lock:
                self._sum.add(product, first)

    def total(self, group: Group) -> Tensor:
        """The sum over all processes of the group: (K, K) float64."""
        gram = torch.empty(self._width, self._width, dtype=torch.float64, device=self._device)
        for part, flat in zip(self._columns, self._sum.parts(group, self._first), strict=True):
            block = flat.view(part.stop, -1)
            gram[: part.stop, part] = block
            gram[part, : part.start] = block[: part.start].T
        return gram


def reach(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value in some tensors; infinite if one of them holds NaN or Inf, 0 if there are none."""
    largest = 0.0
    for tensor in tensors:
        if tensor.numel() == 0:  # such as what an expert gets that no token is sent to
            continue
        low, high = torch.aminmax(tensor)  # NaN comes through
        bound = float(torch.maximum(-low, high))
        if not bound < float("inf"):
            return float("inf")
        largest = max(largest, bound)
    return largest
