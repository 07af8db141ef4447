"""The sums of one layer over all calibration batches, wherever these are.

Two objectives come out of one look at the suspended passes. The *own* one has the inputs of the dense model: what the
layer's new weights do wrong by themselves. The *sequential* one has the inputs that the converted model really gives
to the layer, and the dense layer's outputs as targets: it also sees what the layers before did wrong, and can repair
it.

Shape legend: S = samples (rows), O = out features, K = reduction length.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.patches import count_rows, gemm_rows
from tnm_pipeline.training.convert.sums import ExactSum, reach
from tnm_pipeline.training.layout import to_gemm

_ENOUGH_ROWS = 1 << 17  # of a convolution: four digits of every sum, at a fraction of the time
_MOST_SQUARE = 1e38  # of float32
_COLUMNS_AT_ONCE = 384  # of a gram matrix: blocks below the diagonal are copied, not computed


@dataclass(frozen=True, eq=False)
class Seen:
    """What one batch gave to a layer, in both models.

    Attributes:
        dense: inputs in the dense model, call by call.
        sparse: inputs in the partly converted one; the same tensors if the conversion is not sequential.
        correction: of the layer's output shape, what the sequential target has on top of the dense output; `None` = 0.
        real: (B, T) bool, positions that are no padding; `None` = all.
        half: 0 or 1, for `Collector.halves`: the same for a batch wherever it is.
    """

    dense: Sequence[Tensor]
    sparse: Sequence[Tensor]
    correction: Tensor | None = None
    real: Tensor | None = None
    half: int = 0


class Sums(NamedTuple):
    """X^T X, (K, K) float64, the sum of x, (K,) float64, and the number of rows."""

    gram: Tensor
    inputs: Tensor
    samples: int

    def objective(self, base: Tensor) -> Objective:
        """Of (O, K) weights that are right on these inputs."""
        none = base.new_zeros(len(base))
        targets = ((base @ self.gram) * base).sum(1)
        return Objective(self.gram, base, torch.zeros_like(base), self.inputs, none, none, targets, self.samples)


@dataclass(frozen=True, eq=False)
class Grams:
    """The sums of the dense and the sparse model's inputs; layers that read the same tensors share them.

    Of a convolution's output positions every so-manieth is looked at: neighbours say nearly the same.
    """

    dense: Sums
    half: Sums
    sparse: Sums
    every: int
    largest: float


class Collector:
    """Collects layer by layer and keeps the gram matrices of the last inputs: query, key and value read the same."""

    def __init__(self, group: Group, *, sequential: bool) -> None:
        self._group = group
        self._sequential = sequential
        self._read: list[weakref.ref[Tensor]] = []
        self._grams: Grams | None = None
        self._base = torch.empty(0)
        self._lags: tuple[Tensor, Tensor] | None = None

    def collect(self, name: str, dense: nn.Linear | nn.Conv2d, seen: Sequence[Seen]) -> tuple[Objective, Objective]:
        """The own and the sequential objective; the same object twice if nothing is sequential.

        Args:
            name: of the layer, for messages.
            dense: the layer of the dense model; its weight is the base of the objectives.
            seen: by the batches of this process.

        Raises:
            CalibrationError: no rows, NaN or Inf, or inputs of other shapes in the two models.
        """
        self._check(name, seen)
        grams = self._grams_of(name, dense, seen)
        self._base = to_gemm(dense.weight.detach()).double()
        own = grams.dense.objective(self._base)
        if not self._sequential:
            return own, own
        cross, total, squares = self._residuals(dense, seen, self._base, grams)
        sequential = Objective(
            grams.sparse.gram, self._base, cross, grams.sparse.inputs, total, squares, own.target_squares, own.samples
        )
        return own, sequential

    def halves(self, outputs: int) -> tuple[Objective, Objective] | None:
        """The own objective of the last layer over the batches of half 0 and of half 1, of the first so many outputs.

        Returns:
            `None` if one of the two has no rows.
        """
        assert self._grams is not None
        whole, half = self._grams.dense, self._grams.half
        rest = Sums(whole.gram - half.gram, whole.inputs - half.inputs, whole.samples - half.samples)
        if not half.samples or not rest.samples:
            return None
        return half.objective(self._base[:outputs]), rest.objective(self._base[:outputs])

    def _check(self, name: str, seen: Sequence[Seen]) -> None:
        for one in seen:
            if [x.shape for x in one.dense] != [x.shape for x in one.sparse]:
                raise CalibrationError(
                    f"layer {name} runs {len(one.dense)} times in the dense model and {len(one.sparse)} times in the "
                    "converted one, or on other shapes: its execution depends on the data; leave it out, or use "
                    "sequential = false"
                )

    def _grams_of(self, name: str, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen]) -> Grams:
        read = [x for one in seen for x in (*one.dense, *one.sparse)]
        same = len(read) == len(self._read) and all(a is b() for a, b in zip(read, self._read, strict=True))
        # every process must come to the same decision, and convolutions of other strides cut other rows
        shared = self._group.largest(float(not same), layer.weight.device) == 0 and isinstance(layer, nn.Linear)
        if not shared or self._grams is None:
            self._grams = self._lags = None  # before the new ones need memory
            self._grams = self._sum_grams(name, layer, seen)
            self._read = [weakref.ref(x) for x in read]
        return self._grams

    def _sum_grams(self, name: str, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen]) -> Grams:
        device, width = layer.weight.device, to_gemm(layer.weight).shape[1]
        every = stride(self._rows(layer, seen, 1))
        rows = self._rows(layer, seen, every)
        largest = self._group.largest(reach(x for one in seen for x in (*one.dense, *one.sparse)), device)
        if rows == 0:
            raise CalibrationError(f"layer {name} does not run on the calibration data: leave it out")
        if not rows * largest**2 < _MOST_SQUARE:
            what = "NaN or Inf" if largest == float("inf") else f"inputs up to {largest:.1g}, whose squares overflow,"
            raise CalibrationError(
                f"layer {name} meets {what} on the calibration data: the model overflows on it or "
                "its weights are broken"
            )

        def total(which: str, batches: Sequence[Seen], samples: int) -> Sums:
            gram = ExactSum((width, width), rows * largest**2, device)
            sums = ExactSum((width,), rows * largest, device)
            lock = threading.Lock()

            def add(one: Seen) -> None:
                for inputs in getattr(one, which):
                    for x, _ in gemm_rows(layer, inputs, None, one.real, every):
                        part, column_sums = gram_matrix(x), x.sum(0)
                        with lock:
                            gram.add(part)
                            sums.add(column_sums)

            self._group.each(add, batches)
            return Sums(gram.total(self._group), sums.total(self._group), samples)

        first, second = ([one for one in seen if one.half == half] for half in (0, 1))
        half = total("dense", first, self._rows(layer, first, every))
        rest = total("dense", second, rows - half.samples)
        dense = Sums(half.gram + rest.gram, half.inputs + rest.inputs, rows)
        return Grams(dense, half, total("sparse", seen, rows) if self._sequential else dense, every, largest)

    def _rows(self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], every: int) -> int:
        counted = sum(count_rows(layer, inputs, one.real, every) for one in seen for inputs in one.dense)
        return int(self._group.add(torch.tensor([counted], device=layer.weight.device))[0])

    def _residuals(
        self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], base: Tensor, grams: Grams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """R^T X, the sum of r and ||R||^2 per output, over rows of the sparse model."""
        outputs, width = base.shape
        corrections = [one.correction for one in seen if one.correction is not None]
        corrected = self._group.largest(float(len(corrections) > 0), base.device) > 0
        if corrected or width > outputs:
            return self._sum_residuals(layer, seen, base, grams, reach(corrections))
        # R is the lag L = dense - sparse inputs times base: fewer products, which layers of the same inputs share
        if self._lags is None:
            self._lags = self._sum_lags(layer, seen, grams)
        lag_cross, lag_gram = self._lags
        total = base @ (grams.dense.inputs - grams.sparse.inputs)
        return base @ lag_cross, total, ((base @ lag_gram) * base).sum(1).clamp_min_(0.0)

    def _sum_lags(self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], grams: Grams) -> tuple[Tensor, Tensor]:
        """L^T X of the sparse X, and L^T L."""
        shape, device = grams.sparse.gram.shape, grams.sparse.gram.device
        bound = 2 * grams.sparse.samples * grams.largest**2
        cross, gram = ExactSum(shape, bound, device), ExactSum(shape, 2 * bound, device)
        lock = threading.Lock()

        def add(one: Seen) -> None:
            for dense, sparse in zip(one.dense, one.sparse, strict=True):
                lags = gemm_rows(layer, dense - sparse, None, one.real, grams.every)
                given = gemm_rows(layer, sparse, None, one.real, grams.every)
                for (lag, _), (x, _) in zip(lags, given, strict=True):
                    parts = lag.T @ x, gram_matrix(lag)
                    with lock:
                        cross.add(parts[0])
                        gram.add(parts[1])

        self._group.each(add, seen)
        return cross.total(self._group), gram.total(self._group)

    def _sum_residuals(
        self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], base: Tensor, grams: Grams, corrections: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, residual by residual; corrections: the largest of these batches."""
        device, (outputs, width) = base.device, base.shape
        bound = 2 * grams.largest * float(base.abs().sum(1).max()) + self._group.largest(corrections, device)
        cross = ExactSum((outputs, width), grams.sparse.samples * bound * grams.largest, device)
        total = ExactSum((outputs,), grams.sparse.samples * bound, device)
        squares = ExactSum((outputs,), grams.sparse.samples * bound**2, device)
        lock = threading.Lock()

        def add(one: Seen) -> None:
            for dense, sparse in zip(one.dense, one.sparse, strict=True):
                lags = gemm_rows(layer, dense - sparse, one.correction, one.real, grams.every)
                given = gemm_rows(layer, sparse, None, one.real, grams.every)
                for (lag, correction), (x, _) in zip(lags, given, strict=True):
                    r = lag @ base.to(lag.dtype).T
                    if correction is not None:
                        r += correction
                    part = r.T @ x
                    with lock:
                        cross.add(part)
                        total.add(r.sum(0))
                        squares.add(r.square().sum(0))

        self._group.each(add, seen)
        return cross.total(self._group), total.total(self._group), squares.total(self._group)


def stride(rows: int) -> int:
    """How far apart the positions are that are looked at, given all rows; odd, not to follow the columns of images."""
    return max(1, rows // _ENOUGH_ROWS) // 2 * 2 + 1


def gram_matrix(x: Tensor) -> Tensor:
    """X^T X, computed on and above the diagonal blocks only.

    Args:
        x: (S, K).

    Returns:
        (K, K), same dtype, symmetric.
    """
    width = x.shape[1]
    if width < 2 * _COLUMNS_AT_ONCE:
        return x.T @ x
    gram = x.new_empty(width, width)
    for start in range(0, width, _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, width)
        block = x[:, :end].T @ x[:, start:end]
        gram[:end, start:end] = block
        gram[start:end, :start] = block[:start].T
    return gram
