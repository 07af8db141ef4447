"""Counts and times of a session, in a fixed amount of memory."""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_PER_OCTAVE = 8  # buckets between a time and twice that time: a quantile is within 4.5% of the true one
_SHORTEST = 1e-6  # seconds; what is shorter counts as this
_BUCKETS = 30 * _PER_OCTAVE  # up to 18 minutes


@dataclass(frozen=True)
class Distribution:
    """Times since a session was loaded, in seconds.

    Attributes:
        count: How many.
        total: Their sum.
        p50, p95, p99: Quantiles, each within 4.5%; 0 where there are no times. Of a service that runs for long they
            change slowly: take differences of `buckets` for those of the last minutes, as Prometheus does.
        longest: The exact maximum.
        buckets: Bounds in seconds, each twice the one before, and how many times were below.
    """

    count: int
    total: float
    p50: float
    p95: float
    p99: float
    longest: float
    buckets: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Metrics:
    """What a session has done since it was loaded.

    Attributes:
        answered: Calls that got their answer.
        errors: Calls that got none, by the name of the error class; a cancelled future counts as `"CancelledError"`.
        waiting: Calls in the queue at this moment.
        running: Runs under way at this moment on the artifact that answers now, those that wait for a context included.
        queue: Times that calls spent in the queue, those that were refused there or cancelled included.
        run: Times from the check of the inputs to the answer: those of a context to become free, and of the network.
        runs: Times that the network ran: with batching, one run answers several calls.
        repeated: Joined runs that failed, after which each of their calls ran alone.
        reloads: Artifacts swapped in by `reload`.
        fallback_reason: Why the artifact that was asked for does not answer, None where it does.
    """

    answered: int
    errors: Mapping[str, int]
    waiting: int
    running: int
    queue: Distribution
    run: Distribution
    runs: int
    repeated: int
    reloads: int
    fallback_reason: str | None


class Histogram:
    """Times in buckets whose bounds grow geometrically. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._total = 0.0
        self._longest = 0.0

    def record(self, seconds: float) -> None:
        """Count one time."""
        octaves = math.log2(seconds / _SHORTEST) if seconds > _SHORTEST else 0.0
        self._counts[min(int(octaves * _PER_OCTAVE), _BUCKETS - 1)] += 1
        self._total += seconds
        if seconds > self._longest:
            self._longest = seconds

    def summary(self) -> Distribution:
        """Counts and quantiles so far."""
        count = sum(self._counts)
        p50, p95, p99 = (self._quantile(part, count) for part in (0.5, 0.95, 0.99))
        below = list(itertools.accumulate(self._counts))[_PER_OCTAVE - 1 :: _PER_OCTAVE]
        bounds = tuple((_SHORTEST * 2.0**octave, number) for octave, number in enumerate(below, start=1))
        return Distribution(count, self._total, p50, p95, p99, self._longest, bounds)

    def _quantile(self, part: float, count: int) -> float:
        """The geometric middle of the bucket that holds it, or the longest time where that is shorter."""
        if count == 0:
            return 0.0
        seen = itertools.accumulate(self._counts)
        index = next(index for index, below in enumerate(seen) if below >= part * count)
        return min(float(_SHORTEST * 2 ** ((index + 0.5) / _PER_OCTAVE)), self._longest)


class Recorder:
    """Where a session counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = 0
        self._runs = 0
        self._repeated = 0
        self._reloads = 0
        self._errors: Counter[str] = Counter()
        self._queue = Histogram()
        self._run = Histogram()

    def ran(self, seconds: float, calls: int = 1) -> None:
        """One run that answered so many calls."""
        with self._lock:
            self._runs += 1
            self._answered += calls
            self._run.record(seconds)

    def queued(self, seconds: float) -> None:
        """A call left the queue."""
        with self._lock:
            self._queue.record(seconds)

    def failed(self, error: str) -> None:
        """A call ends without an answer."""
        with self._lock:
            self._errors[error] += 1

    def repeated(self) -> None:
        """A joined run failed."""
        with self._lock:
            self._repeated += 1

    def reloaded(self) -> None:
        """Another artifact answers from now on."""
        with self._lock:
            self._reloads += 1

    def read(self, *, waiting: int, running: int, fallback_reason: str | None) -> Metrics:
        """Everything at one moment; what is not counted here is passed in."""
        with self._lock:
            return Metrics(
                answered=self._answered,
                errors=dict(self._errors),
                waiting=waiting,
                running=running,
                queue=self._queue.summary(),
                run=self._run.summary(),
                runs=self._runs,
                repeated=self._repeated,
                reloads=self._reloads,
                fallback_reason=fallback_reason,
            )
