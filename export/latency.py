"""Latency of several callables, interleaved: what disturbs one round disturbs all of its members alike."""

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.export import gpu_state
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.gpu_state import GpuState
from tnm_pipeline.export.reasons import Finding, finding

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_WIDEST = 0.1  # of the ratio; beyond, an interval that holds 1 could hide any gain that 2:4 is known for


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
        samples_per_s: Throughput at the median: the samples of a call over its time.
    """

    name: str
    median_us: float
    p95_us: float
    iqr_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    samples_per_s: float

    @property
    def reach(self) -> float:
        """How far the interval of the ratio reaches from 1, on the side where that is farther, as a factor above 1."""
        return max(self.ratio_high, 1 / self.ratio_low)


@dataclass(frozen=True)
class LatencyTable:
    """One measurement.

    Attributes:
        baseline: The row whose ratio is 1.
        control: The row of the same thing once more: how far its ratio is from 1 is what the machine makes up.
        repeats: Timed rounds; each calls everything once.
        warmup: Untimed rounds before them.
        samples: How many samples a call answers.
        rows: In the order of the callables.
        environment: Where it was measured.
        looks: At the GPU, after the warm-up, halfway and at the end; empty where nothing ran on one or none answers.
        disturbance: Why the looks say that the times say little; None if they do not.
    """

    baseline: str
    control: str
    repeats: int
    warmup: int
    samples: int
    rows: tuple[LatencyRow, ...]
    environment: Mapping[str, object]
    looks: tuple[GpuState, ...] = ()
    disturbance: Finding | None = None

    def row(self, name: str) -> LatencyRow:
        """The row of that name, which must be there."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, object]:
        """JSON-able data, `{"environment": ..., "rows": [...], ...}`."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """What a measurement lets one say of a sparse network against its dense twin, or of any against another.

    Attributes:
        key: `"faster"`, or one of the reasons: `"no-difference"`, `"dense-faster"` (`"slower"` where not both are known
            to be what these words say), and where nothing can be claimed `"spread-too-wide"`, `"gpu-throttled"` or
            `"gpu-shared"`.
        sentence: What to tell a person, with the figures.
        remedy: What to do; empty where nothing need be done.
    """

    key: str
    sentence: str
    remedy: str


def claim(table: LatencyTable, name: str) -> Claim:
    """Say no more than the figures carry.

    The interval of the ratio is widened on both sides by as much as the control's reaches from 1: the control is the
    dense twin timed as if it were another network, so that is a difference which this machine makes up, by where
    memory lies and which threads wait, and which no number of rounds averages out. Measured with a network against
    itself on two busy cores, in 180 comparisons: the interval alone excluded 1 in 78 of them, the widened one in 4.

    If the widened interval lies on one side of 1, that is the faster side, however wide it is. If it holds 1 there is
    no difference, unless it is wider than a tenth of the ratio: 2:4 makes whole networks 1.01 to 1.27 times as fast
    (NVIDIA's tables), so such an interval excludes nothing of interest and is refused. So is what was timed on a GPU
    which was slowed or shared.

    Args:
        table: A measurement whose baseline is the dense twin, called `dense`, or another network.
        name: The other row: `sparse`, if that is what it is. Other names stand in the sentence as they are.
    """
    row, control = table.row(name), table.row(table.control)
    if table.disturbance is not None:
        return _because(table.disturbance)
    low, high = row.ratio_low / control.reach, row.ratio_high * control.reach
    twins = (name, table.baseline) == ("sparse", "dense")
    figures = {"ratio": row.ratio, "low": low, "high": high}
    takes = f"{name} takes {row.ratio:.3f} of the time of {table.baseline}"
    if high < 1:
        one = "the sparse engine" if twins else name
        gain = f"{1 / row.ratio:.2f} times as fast as {table.baseline} ({1 / high:.2f} to {1 / low:.2f})"
        return Claim("faster", f"{one} is {gain}", "")
    if low > 1:
        slower = Claim("slower", f"{takes} ({low:.3f} to {high:.3f})", "")
        return _because(finding("dense-faster", **figures)) if twins else slower
    if high - low <= _WIDEST * row.ratio:
        same = Claim("no-difference", f"{takes}, and the interval {low:.3f} to {high:.3f} holds 1", "")
        return _because(finding("no-difference", **figures)) if twins else same
    again = f"{table.baseline} against itself {control.ratio_low:.2f} to {control.ratio_high:.2f}"
    why = f"the interval of {name} over {table.baseline} is {row.ratio_low:.2f} to {row.ratio_high:.2f}, and {again}"
    return _because(finding("spread-too-wide", why=why))


def _because(found: Finding) -> Claim:
    return Claim(found.key, found.message, found.remedy)


def measure(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    baseline: str,
    control: str,
    samples: int = 1,
    on_gpu: bool = False,
    seed: int = 0,
) -> LatencyTable:
    """Time every callable once per round, in a new random order each round.

    Args:
        callables: Name -> a call that returns when its work is done (a GPU call must synchronise).
        repeats: Timed rounds, at least 2.
        warmup: Rounds before them that do not count.
        baseline: The callable that ratios refer to.
        control: A callable that does the same by other means: the baseline's artifact, loaded once more.
        samples: How many samples a call answers.
        on_gpu: Whether they run on GPU 0, which is then looked at three times.
        seed: Of the orders and of the bootstrap.

    Returns:
        The table. Garbage collection is off while it is measured.

    Raises:
        ValueError: `baseline` or `control` is not a key of `callables`, or they are one; `repeats` < 2 or `warmup` < 0.
    """
    for role, name in (("baseline", baseline), ("control", control)):
        if name not in callables:
            raise ValueError(f"{role} {name!r} is not measured; choose from {', '.join(callables) or 'nothing'}")
    if baseline == control:
        raise ValueError(f"baseline and control are both {baseline!r}: give the control a name of its own")
    if repeats < 2 or warmup < 0:
        raise ValueError(f"repeats must be 2 or more and warmup 0 or more, not {repeats} and {warmup}")
    looks: list[GpuState | None] = []
    order = random.Random(seed)  # noqa: S311 - an order, no secret
    with _no_garbage_collection():
        times = _time_rounds(
            callables, repeats, warmup, order, lambda: looks.append(gpu_state.read() if on_gpu else None)
        )
    seen = tuple(look for look in looks if look is not None)
    found = (gpu_state.disturbance(before, after) for before, after in itertools.pairwise(seen))
    return LatencyTable(
        baseline=baseline,
        control=control,
        repeats=repeats,
        warmup=warmup,
        samples=samples,
        rows=tuple(
            _row(name, times[name], times[baseline], samples, np.random.default_rng(seed)) for name in callables
        ),
        environment=environment(),
        looks=seen,
        disturbance=next((disturbance for disturbance in found if disturbance is not None), None),
    )


def _time_rounds(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    order: random.Random,
    look: Callable[[], object],
) -> dict[str, NDArray[np.float64]]:
    """Name -> nanoseconds per round, shape (repeats,). Looks after the warm-up, halfway and at the end."""
    times = {name: np.zeros(repeats) for name in callables}
    names = list(callables)
    for index in range(-warmup, repeats):
        if index in (0, repeats // 2):
            look()
        order.shuffle(names)
        for name in names:
            call = callables[name]
            start = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - start
            if index >= 0:
                times[name][index] = elapsed
    look()
    return times


def _row(
    name: str, times: NDArray[np.float64], baseline: NDArray[np.float64], samples: int, rng: np.random.Generator
) -> LatencyRow:
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
        samples_per_s=samples * 1e6 / max(float(middle), 1e-3),
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
