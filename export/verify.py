"""Accuracy: whether an artifact computes what its reference computes, to the precision it claims."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.export.errors import AccuracyGateFailed

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference; with several outputs, the worst of each figure.

    Attributes:
        output: The output that is farthest, measured by `scaled`.
        max_abs: Largest absolute difference.
        scaled: `max_abs` over max(1, largest absolute reference value).
        relative_to_absmax: `max_abs` over the largest absolute reference value.
        cosine: Cosine similarity of the flattened outputs.
        top1_agreement: Fraction of rows whose argmax along the last axis is the same.
    """

    output: str
    max_abs: float
    scaled: float
    relative_to_absmax: float
    cosine: float
    top1_agreement: float


@dataclass(frozen=True)
class Limit:
    """What a precision must stay within.

    Attributes:
        figure: The attribute of `Parity` that is limited.
        at_most: Its largest accepted value.
        cosine: The smallest accepted cosine.
        advice: What to do when one is exceeded.
    """

    figure: str
    at_most: float
    cosine: float
    advice: str


_HALF = "keep the layer that needs it in fp32: `tnm-pipeline bisect` names it, export.keep_fp32 takes it"

# fp32: rounding errors grow with the values that are summed, so an absolute limit alone would refuse a correct
# model with outputs in the hundreds, and a relative one alone would refuse outputs that are all near zero.
# Measured on correct exports: 2.4e-6 absolute (fp32); in fp16, of the output's absolute maximum, 1e-3 on MiniLM and
# 2.7e-3 on EfficientNet-lite0 (torch's own fp16: 2.5e-3), whose 50 layers each round. bf16 has 3 bits less: a factor 8.
LIMITS: Mapping[str, Limit] = {
    "fp32": Limit("scaled", 1e-5, 0.9999, "The two compute different things: export with another export.opset"),
    "fp16": Limit("relative_to_absmax", 5e-3, 0.9999, f"Some layer needs more range or precision: {_HALF}"),
    "bf16": Limit("relative_to_absmax", 4e-2, 0.999, f"Some layer needs more precision: {_HALF}"),
}


class Tally:
    """How far a candidate is from its reference, over any number of batches, none of which is kept."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def add(self, reference: Arrays, candidate: Arrays, attended: NDArray[np.bool_] | None = None) -> None:
        """Count one batch.

        Args:
            reference: Outputs by name, any float or integer dtype, shape (samples, ...).
            candidate: The same names and shapes.
            attended: (samples, tokens), False where a token is padding: what an output (samples, tokens, ...) holds
                there is read by nobody, and rounds ten times worse than the rest. None: all count.

        Raises:
            AccuracyGateFailed: Names or shapes differ, or there is nothing to compare.
        """
        if reference.keys() != candidate.keys() or not reference:
            raise AccuracyGateFailed(
                f"the reference has outputs {sorted(reference)} and the candidate {sorted(candidate)}; "
                "compare artifacts of the same model"
            )
        for name, expected in reference.items():
            actual = candidate[name]
            if expected.shape != actual.shape or not expected.size:
                raise AccuracyGateFailed(
                    f"output {name!r} has shape {actual.shape}, its reference {expected.shape}; "
                    "compare non-empty outputs of the same inputs"
                )
            if attended is not None and expected.shape[:2] == attended.shape:
                expected, actual = expected[attended], actual[attended]
            self._outputs.setdefault(name, _Output()).add(expected.astype(np.float64), actual.astype(np.float64))

    def parity(self) -> Parity:
        """The parity so far. A NaN in either makes `max_abs` NaN, which no limit accepts."""
        each = {name: output.parity(name) for name, output in self._outputs.items()}
        return Parity(
            output=max(each, key=lambda name: np.nan_to_num(each[name].scaled, nan=math.inf)),
            max_abs=_worst(parity.max_abs for parity in each.values()),
            scaled=_worst(parity.scaled for parity in each.values()),
            relative_to_absmax=_worst(parity.relative_to_absmax for parity in each.values()),
            cosine=-_worst(-parity.cosine for parity in each.values()),
            top1_agreement=min(parity.top1_agreement for parity in each.values()),
        )


class _Output:
    """Sums over the batches of one output."""

    def __init__(self) -> None:
        self.max_abs = self.absmax = self.product = self.expected = self.actual = 0.0
        self.agreeing = self.rows = 0

    def add(self, expected: NDArray[np.float64], actual: NDArray[np.float64]) -> None:
        self.max_abs = _worst((self.max_abs, float(np.abs(expected - actual).max())))
        self.absmax = max(self.absmax, float(np.abs(expected).max()))
        self.product += float(np.vdot(expected, actual))
        self.expected += float(np.vdot(expected, expected))
        self.actual += float(np.vdot(actual, actual))
        same = expected.argmax(-1) == actual.argmax(-1) if expected.ndim else np.True_
        self.agreeing += int(np.count_nonzero(same))
        self.rows += int(np.size(same))

    def parity(self, name: str) -> Parity:
        norms = math.sqrt(self.expected) * math.sqrt(self.actual)
        return Parity(
            output=name,
            max_abs=self.max_abs,
            scaled=self.max_abs / max(1.0, self.absmax),
            relative_to_absmax=_ratio(self.max_abs, self.absmax),
            cosine=self.product / norms if norms else float(self.expected == self.actual),
            top1_agreement=self.agreeing / self.rows,
        )


def compare(reference: Arrays, candidate: Arrays) -> Parity:
    """Measure how far the outputs of one call are from their reference, see `Tally`."""
    tally = Tally()
    tally.add(reference, candidate)
    return tally.parity()


def check(parity: Parity, precision: str, artifact: str) -> None:
    """Apply the limits of a precision.

    Args:
        parity: What was measured.
        precision: A key of `LIMITS`.
        artifact: What a message calls the candidate.

    Raises:
        AccuracyGateFailed: A limit is exceeded; the message has both numbers and what to do.
    """
    limit = LIMITS[precision]
    value: float = getattr(parity, limit.figure)
    if value <= limit.at_most and parity.cosine >= limit.cosine:  # NaN fails too
        return
    raise AccuracyGateFailed(
        f"{artifact} differs from torch at output {parity.output!r}: {limit.figure} = {value:.3g}, limit "
        f"{limit.at_most:g}; cosine {parity.cosine:.6f}, limit {limit.cosine:g} (max_abs {parity.max_abs:.3g}, top-1 "
        f"agreement {parity.top1_agreement:.4f}). {limit.advice}"
    )


def _ratio(error: float, absmax: float) -> float:
    if absmax == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / absmax


def _worst(values: Iterable[float]) -> float:
    """The largest value; NaN if any is, which `max` alone would miss depending on the order."""
    return float(np.max(list(values)))
