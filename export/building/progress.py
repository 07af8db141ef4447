"""How far a build is, and how long it may still take, from the phases that a builder reports."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

_SOON_S = 1.0  # before, too little was seen to say anything


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build that is done.

    Attributes:
        phase: What the builder calls it (`"Computing profile costs"`), or `"Reading the graph"` until it begins. Phases
            nest, and steps are of unequal length.
        done: Steps of the phase that are done.
        total: Its steps in all.
        seconds_left: An estimate for the whole build; None in its first second.
    """

    phase: str
    done: int
    total: int
    seconds_left: float | None


@dataclass
class _Phase:
    begun: float
    total: int
    done: int = 0


class Phases:
    """The phases under way, outermost first.

    Args:
        clock: Seconds since any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = self._stepped = clock()
        self._open: dict[str, _Phase] = {}
        self._last = BuildProgress("Reading the graph", 0, 1, None)

    def start(self, name: str, total: int) -> None:
        """A phase begins, inside of those under way."""
        self._open[name] = _Phase(self._clock(), total)

    def finish(self, name: str) -> None:
        """A phase ends."""
        self._open.pop(name, None)

    def step(self, name: str, done: int) -> BuildProgress:
        """A phase has done `done` of its steps."""
        now = self._stepped = self._clock()
        phase = self._open.setdefault(name, _Phase(now, done))  # two of one name may overlap, and one has ended
        phase.done = done
        soon = now - self._begun < _SOON_S
        self._last = BuildProgress(name, done, phase.total, None if soon else self._seconds_left(phase, now))
        return self._last

    def tick(self) -> BuildProgress:
        """The last step again, as long ago as it is."""
        left, waited = self._last.seconds_left, self._clock() - self._stepped
        return replace(self._last, seconds_left=None if left is None else max(0.0, left - waited))

    def _seconds_left(self, reporting: _Phase, now: float) -> float:
        """Innermost first: what is left of a phase is what is left of its step under way, and the steps after it.

        Those are taken to last as long as the steps so far did on average, the one under way included.
        """
        left = 0.0
        for phase in reversed(self._open.values()):
            passed = phase.done if phase is reporting else phase.done + 1
            left += max(0, phase.total - passed) * (now - phase.begun + left) / max(1, passed)
        return left
