"""Latency of several callables, interleaved: what disturbs one round disturbs all of its members alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.export.environment import environment

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class LatencyRow:
    """One callable.

    Attributes:
        name: Its key.
        median_us: Median time of a call, microseconds.
        p95_us: 95th percentile.
        iqr_us: Spread: 75th minus 25th percentile.
        ratio: Median over rounds of its time / the baseline's time in the same round; below 1 is faster.
        ratio_low: Lower end of the ratio's 95% bootstrap interval.
        ratio_high: Upper end. An interval that holds 1 shows no difference.
    """

    name: str
    median_us: float
    p95_us: float
    iqr_us: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class LatencyTable:
    """One measurement.

    Attributes:
        baseline: The row whose ratio is 1.
        repeats: Timed rounds; each calls everything once.
        warmup: Untimed rounds before them.
        rows: In the order of the callables.
        environment: Where it was measured.
    """

    baseline: str
    repeats: int
    warmup: int
    rows: tuple[LatencyRow, ...]
    environment: Mapping[str, object]

    def to_dict(self) -> dict[str, object]:
        """JSON-able data, `{"environment": ..., "rows": [...], ...}`."""
        return {
            "baseline": self.baseline,
            "repeats": self.repeats,
            "warmup": self.warmup,
            "environment": dict(self.environment),
            "rows": [asdict(row) for row in self.rows],
        }


def measure(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    baseline: str,
    seed: int = 0,
) -> LatencyTable:
    """Time every callable once per round, in a new random order each round.

    Args:
        callables: Name -> a call that returns when its work is done (a GPU call must synchronise).
        repeats: Timed rounds, at least 2.
        warmup: Rounds before them that do not count.
        baseline: The callable that ratios refer to.
        seed: Of the orders and of the bootstrap.

    Returns:
        The table. Garbage collection is off while it is measured.

    Raises:
        ValueError: `baseline` is not a key of `callables`, `repeats` < 2 or `warmup` < 0.
    """
    if baseline not in callables:
        raise ValueError(f"baseline {baseline!r} is not measured; choose from {', '.join(callables) or 'nothing'}")
    if repeats < 2 or warmup < 0:
        raise ValueError(f"repeats must be 2 or more and warmup 0 or more, not {repeats} and {warmup}")
    with _no_garbage_collection():
        times = _time_rounds(callables, repeats, warmup, random.Random(seed))  # noqa: S311 - an order, no secret
    rows = tuple(_row(name, times[name], times[baseline], np.random.default_rng(seed)) for name in callables)
    return LatencyTable(baseline, repeats, warmup, rows, environment())


def _time_rounds(
    callables: Mapping[str, Callable[[], object]], repeats: int, warmup: int, order: random.Random
) -> dict[str, NDArray[np.float64]]:
    """Name -> nanoseconds per round, shape (repeats,)."""
    times = {name: np.zeros(repeats) for name in callables}
    names = list(callables)
    for index in range(-warmup, repeats):
        order.shuffle(names)
        for name in names:
            call = callables[name]
            start = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - start
            if index >= 0:
                times[name][index] = elapsed
    return times


def _row(name: str, times: NDArray[np.float64], baseline: NDArray[np.float64], rng: np.random.Generator) -> LatencyRow:
    low, middle, high, p95 = np.percentile(times, (25, 50, 75, 95)) / 1e3
    ratios = times / np.maximum(baseline, 1.0)  # a call below the clock's resolution takes 0 ns
    resampled = [float(np.median(rng.choice(ratios, ratios.size))) for _ in range(_RESAMPLES)]
    tail = 100 * (1 - _CONFIDENCE) / 2
    ratio_low, ratio_high = np.percentile(resampled, (tail, 100 - tail))
    return LatencyRow(
        name=name,
        median_us=float(middle),
        p95_us=float(p95),
        iqr_us=float(high - low),
        ratio=float(np.median(ratios)),
        ratio_low=float(ratio_low),
        ratio_high=float(ratio_high),
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a call would be billed to whichever call it hit."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
