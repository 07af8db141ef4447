"""The sums of one layer over all calibration batches, wherever these are.

Two objectives come out of one look at the suspended passes. The *own* one has the inputs of the dense model: what the
layer's new weights do wrong by themselves. The *sequential* one has the inputs that the converted model really gives
to the layer, and the dense layer's outputs as targets: it also sees what the layers before did wrong, and can repair
it.

Shape legend: S = samples (rows), O = out features, K = reduction length.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.patches import count_rows, gemm_rows, stride
from tnm_pipeline.training.convert.sums import ExactGram, ExactSum, reach
from tnm_pipeline.training.layout import to_gemm

_MOST_SQUARE = 1e38  # of float32


@dataclass(frozen=True, eq=False)
class Seen:
    """What one batch gave to a layer, in both models.

    Attributes:
        dense: inputs in the dense model, call by call.
        sparse: inputs in the partly converted one; the same tensors if the conversion is not sequential.
        correction: makes what the sequential target has on top of the dense output, of that shape; `None` = 0.
        real: (B, T) bool, positions that are no padding; `None` = all.
        half: 0 or 1, for `Collector.halves`: the same for a batch wherever it is.
    """

    dense: Sequence[Tensor]
    sparse: Sequence[Tensor]
    correction: Callable[[], Tensor] | None = None
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

    Attributes:
        dense: of all batches.
        half: of those of half 0, its matrix in float32; `None` if they have all rows, or none.
        sparse: of all batches.
    """

    dense: Sums
    half: Sums | None
    sparse: Sums


class Extent(NamedTuple):
    """What the sums of a layer's inputs have to know beforehand.

    Attributes:
        every: so-manieth output position of a convolution is looked at: neighbours say nearly the same.
        rows: that are looked at, in either model.
        largest: absolute value of an input.
    """

    every: int
    rows: int
    largest: float


class Collector:
    """Collects layer by layer and keeps the gram matrices of the last inputs: query, key and value read the same."""

    def __init__(self, group: Group, *, sequential: bool) -> None:
        self._group = group
        self._sequential = sequential
        # by the last layer, each with how often it had been written then; None: for a convolution, or nothing yet
        self._read: list[tuple[weakref.ref[Tensor], int]] | None = None
        self._extent: Extent | None = None
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
        extent = self._extent_of(name, dense, seen)
        self._base = to_gemm(dense.weight.detach()).to(torch.float64, copy=True)
        direct = self._sequential and self._wants_residuals(seen)
        # before the gram matrices need memory
        residuals = self._sum_residuals(dense, seen, extent) if direct else None
        self._grams = grams = self._grams or self._sum_grams(dense, seen, extent)
        own = grams.dense.objective(self._base)
        if not self._sequential:
            return own, own
        cross, total, squares = residuals or self._residuals_of_lags(dense, seen, grams, extent)
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
        if half is None:
            return None
        half = half._replace(gram=half.gram.double())
        rest = Sums(whole.gram - half.gram, whole.inputs - half.inputs, whole.samples - half.samples)
        return half.objective(self._base[:outputs]), rest.objective(self._base[:outputs])

    def _check(self, name: str, seen: Sequence[Seen]) -> None:
        for one in seen:
            if [x.shape for x in one.dense] != [x.shape for x in one.sparse]:
                raise CalibrationError(
                    f"layer {name} runs {len(one.dense)} times in the dense model and {len(one.sparse)} times in the "
                    "converted one, or on other shapes: its execution depends on the data; leave it out, or use "
                    "sequential = false"
                )

    def _extent_of(self, name: str, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen]) -> Extent:
        """The last layer's, along with its gram matrices, or a new one and no matrices yet."""
        linear = isinstance(layer, nn.Linear)  # convolutions cut rows of their own
        read = [(x, x._version) for one in seen for x in (*one.dense, *one.sparse)]
        same = (
            linear
            and self._read is not None
            and [(id(x), version) for x, version in read] == [(id(x()), version) for x, version in self._read]
        )
        shared = self._group.largest(float(not same), layer.weight.device) == 0  # all processes decide alike
        if not shared or self._extent is None:
            self._grams = self._lags = None
            self._extent = self._measure(name, layer, seen)
            self._read = [(weakref.ref(x), version) for x, version in read] if linear else None
        return self._extent

    def _measure(self, name: str, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen]) -> Extent:
        every = stride(self._rows(layer, seen, 1))
        rows = self._rows(layer, seen, every)
        inputs = (x for one in seen for x in (*one.dense, *one.sparse))
        largest = self._group.largest(reach(inputs), layer.weight.device)
        if rows == 0:
            raise CalibrationError(f"layer {name} does not run on the calibration data: leave it out")
        if not rows * largest**2 < _MOST_SQUARE:
            what = "NaN or Inf" if largest == float("inf") else f"inputs up to {largest:.1g}, whose squares overflow,"
            raise CalibrationError(
                f"layer {name} meets {what} on the calibration data: the model overflows on it or "
                "its weights are broken"
            )
        return Extent(every, rows, largest)

    def _sum_grams(self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], extent: Extent) -> Grams:
        device, width = layer.weight.device, to_gemm(layer.weight).shape[1]
        every, rows, largest = extent

        def total(which: str, batches: Sequence[Seen], samples: int) -> Sums:
            gram = ExactGram(width, rows * largest**2, device)
            sums = ExactSum((width,), rows * largest, device)
            lock = threading.Lock()

            def add(one: Seen) -> None:
                for inputs in getattr(one, which):
                    for x, _ in gemm_rows(layer, inputs, None, one.real, every):
                        gram.add(x)
                        with lock:
                            sums.add(x.sum(0))

            self._group.each(add, batches)
            return Sums(gram.total(self._group), sums.total(self._group), samples)

        first, second = ([one for one in seen if one.half == half] for half in (0, 1))
        count = self._rows(layer, first, every)
        half = None if count in (0, rows) else total("dense", first, count)
        dense = total("dense", seen if half is None else second, rows if half is None else rows - count)
        if half is not None:
            dense = Sums(dense.gram.add_(half.gram), dense.inputs.add_(half.inputs), rows)
            half = half._replace(gram=half.gram.float())  # a trial needs no more
        return Grams(dense, half, total("sparse", seen, rows) if self._sequential else dense)

    def _rows(self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], every: int) -> int:
        counted = sum(count_rows(layer, inputs, one.real, every) for one in seen for inputs in one.dense)
        return int(self._group.add(torch.tensor([counted], device=layer.weight.device))[0])

    def _wants_residuals(self, seen: Sequence[Seen]) -> bool:
        """Whether residuals have to be summed one by one, or take fewer products than the lags between inputs."""
        outputs, width = self._base.shape
        corrected = any(one.correction is not None for one in seen)
        return self._group.largest(float(corrected), self._base.device) > 0 or width > outputs

    def _residuals_of_lags(
        self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], grams: Grams, extent: Extent
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_sum_residuals`: R is the lag L = dense - sparse inputs times base, and L is shared by layers."""
        if self._lags is None:
            self._lags = self._sum_lags(layer, seen, extent)
        base, (lag_cross, lag_gram) = self._base, self._lags
        total = base @ (grams.dense.inputs - grams.sparse.inputs)
        return base @ lag_cross, total, ((base @ lag_gram) * base).sum(1).clamp_min_(0.0)

    def _sum_lags(self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], extent: Extent) -> tuple[Tensor, Tensor]:
        """L^T X of the sparse X, and L^T L."""
        shape, device = 2 * self._base.shape[1:], self._base.device
        bound = 2 * extent.rows * extent.largest**2
        cross, gram = ExactSum(shape, bound, device), ExactGram(shape[0], 2 * bound, device)
        lock = threading.Lock()

        def add(one: Seen) -> None:
            for dense, sparse in zip(one.dense, one.sparse, strict=True):
                lags = gemm_rows(layer, dense - sparse, None, one.real, extent.every)
                given = gemm_rows(layer, sparse, None, one.real, extent.every)
                for (lag, _), (x, _) in zip(lags, given, strict=True):
                    gram.add(lag)
                    product = lag.T @ x
                    with lock:
                        cross.add(product)

        self._group.each(add, seen)
        return cross.total(self._group), gram.total(self._group)

    def _sum_residuals(
        self, layer: nn.Linear | nn.Conv2d, seen: Sequence[Seen], extent: Extent
    ) -> tuple[Tensor, Tensor, Tensor]:
        """R^T X, the sum of r and ||R||^2 per output, over rows of the sparse model."""
        every, rows, largest = extent
        base, device, (outputs, width) = self._base, self._base.device, self._base.shape
        corrections = reach(one.correction() for one in seen if one.correction is not None)
        bound = 2 * largest * float(base.abs().sum(1).max()) + self._group.largest(corrections, device)
        cross = ExactSum((outputs, width), rows * bound * largest, device)
        total = ExactSum((outputs,), rows * bound, device)
        squares = ExactSum((outputs,), rows * bound**2, device)
        lock = threading.Lock()

        def add(one: Seen) -> None:
            for dense, sparse in zip(one.dense, one.sparse, strict=True):
                wanted = None if one.correction is None else one.correction()
                given = gemm_rows(layer, sparse, None, one.real, every)
                for lag, correction in gemm_rows(layer, dense - sparse, wanted, one.real, every):
                    r = lag @ base.to(lag.dtype).T
                    del lag  # before the inputs need as much memory
                    if correction is not None:
                        r += correction
                    part = r.T @ next(given)[0]
                    with lock:
                        cross.add(part)
                        total.add(r.sum(0))
                        squares.add(r.square().sum(0))

        self._group.each(add, seen)
        return cross.total(self._group), total.total(self._group), squares.total(self._group)
