"""Accuracy: whether an artifact computes what its reference computes, to the precision it claims."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.engines import load
from tnm_pipeline.export.errors import AccuracyGateFailed

Arrays = NDArray[Any] | Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference; with several outputs, the worst of each figure.

    Attributes:
        max_abs: Largest absolute difference.
        scaled: `max_abs` over max(1, largest absolute reference value).
        relative_to_absmax: `max_abs` over the largest absolute reference value.
        cosine: Cosine similarity of the flattened outputs.
        top1_agreement: Fraction of rows whose argmax along the last axis is the same.
    """

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
        advice: What to do when it is exceeded.
    """

    figure: str
    at_most: float
    advice: str


# fp32: rounding errors grow with the values that are summed, so an absolute limit alone would refuse a correct
# model with outputs in the hundreds, and a relative one alone would refuse outputs that are all near zero.
# Measured on correct exports: 2.4e-6 absolute (fp32), 8e-4 of the output's absolute maximum (fp16).
LIMITS: Mapping[str, Limit] = {
    "fp32": Limit(
        "scaled",
        1e-5,
        "the two compute different things: compare the layers one by one with `polygraphy debug reduce`",
    ),
    "fp16": Limit(
        "relative_to_absmax",
        1.5e-3,
        "some layer needs more range or precision than fp16 has: keep the model in fp32, or rescale that layer",
    ),
}


def compare(reference: Arrays, candidate: Arrays) -> Parity:
    """Measure how far `candidate` is from `reference`.

    Args:
        reference: One output, or outputs by name; any float dtype.
        candidate: The same names and shapes.

    Returns:
        The parity. A NaN in either makes `max_abs` NaN, which no limit accepts.

    Raises:
        AccuracyGateFailed: Names or shapes differ, or there is nothing to compare.
    """
    expected, actual = _named(reference), _named(candidate)
    if expected.keys() != actual.keys() or not expected:
        raise AccuracyGateFailed(
            f"the reference has outputs {sorted(expected)} and the candidate {sorted(actual)}; "
            "compare artifacts of the same model"
        )
    each = [_compare(name, expected[name], actual[name]) for name in expected]
    return Parity(
        max_abs=_worst(parity.max_abs for parity in each),
        scaled=_worst(parity.scaled for parity in each),
        relative_to_absmax=_worst(parity.relative_to_absmax for parity in each),
        cosine=-_worst(-parity.cosine for parity in each),
        top1_agreement=min(parity.top1_agreement for parity in each),
    )


def check(parity: Parity, precision: str) -> None:
    """Apply the limit of a precision.

    Args:
        parity: What `compare` measured.
        precision: A key of `LIMITS`.

    Raises:
        AccuracyGateFailed: The limit is exceeded; the message has both numbers and what to do.
    """
    limit = LIMITS[precision]
    value: float = getattr(parity, limit.figure)
    if not value <= limit.at_most:  # NaN fails too
        raise AccuracyGateFailed(
            f"{precision} differs from its reference by {limit.figure} = {value:.3g}, the limit is "
            f"{limit.at_most:g} (max_abs {parity.max_abs:.3g}, cosine {parity.cosine:.6f}, top-1 agreement "
            f"{parity.top1_agreement:.4f}); {limit.advice}"
        )


def verify_onnx(
    reference: NDArray[Any], artifact: Path, inputs: NDArray[Any], precision: str, *, batch: int = 256
) -> tuple[NDArray[Any], Parity]:
    """Run an ONNX artifact through the production loader on the CPU and check it against the model it came from.

    Args:
        reference: What the model answers to `inputs`, shape (samples, ...).
        artifact: An ONNX file with its manifest, of one input and one output.
        inputs: Shape (samples, ...), of the input's dtype.
        precision: A key of `LIMITS`.
        batch: Samples run at once, which bounds the memory.

    Returns:
        The artifact's answers, and their parity, which is within the limit.

    Raises:
        AccuracyGateFailed: Outside the limit.
        ArtifactRejected: The artifact is not what its manifest says.
    """
    answers = answer(artifact, inputs, batch=batch)
    parity = compare(reference, answers)
    check(parity, precision)
    return answers, parity


def answer(artifact: Path, inputs: NDArray[Any], *, batch: int = 256) -> NDArray[Any]:
    """What an ONNX artifact of one input and one output gives on the CPU, through the production loader.

    Args:
        artifact: With its manifest.
        inputs: Shape (samples, ...).
        batch: Samples run at once.

    Returns:
        Shape (samples, ...).

    Raises:
        ArtifactRejected: The artifact is not what its manifest says.
    """
    with load(artifact, device="cpu") as session:
        name, output = session.inputs[0].name, session.outputs[0].name
        starts = range(0, len(inputs), batch)
        return np.concatenate([session.run({name: inputs[start : start + batch]})[output] for start in starts])


def _named(arrays: Arrays) -> Mapping[str, NDArray[Any]]:
    return arrays if isinstance(arrays, Mapping) else {"output": arrays}


def _compare(name: str, reference: NDArray[Any], candidate: NDArray[Any]) -> Parity:
    if reference.shape != candidate.shape or not reference.size:
        raise AccuracyGateFailed(
            f"output {name!r} has shape {candidate.shape}, its reference {reference.shape}; "
            "compare non-empty outputs of the same inputs"
        )
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    max_abs = float(np.abs(expected - actual).max())
    absmax = float(np.abs(expected).max())
    return Parity(
        max_abs=max_abs,
        scaled=max_abs / max(1.0, absmax),
        relative_to_absmax=_ratio(max_abs, absmax),
        cosine=_cosine(expected, actual),
        top1_agreement=_top1_agreement(expected, actual),
    )


def _ratio(error: float, absmax: float) -> float:
    if absmax == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / absmax


def _cosine(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(expected)) * float(np.linalg.norm(actual))
    if norms == 0.0:
        return 1.0 if np.array_equal(expected, actual) else 0.0
    return float(np.vdot(expected, actual)) / norms


def _top1_agreement(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    if expected.ndim == 0:
        return 1.0
    return float(np.mean(expected.argmax(axis=-1) == actual.argmax(axis=-1)))


def _worst(values: Iterable[float]) -> float:
    """The largest value; NaN if any is, which `max` alone would miss depending on the order."""
    return float(np.max(list(values)))
