"""Artifacts timed against each other as production would run them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from numpy.typing import NDArray

from tnm_pipeline.export.latency import LatencyTable, measure

Arrays = Mapping[str, NDArray[Any]]

SESSIONS = 3  # of each artifact


class Loaded(Protocol):
    """What is timed: a session of `tnm_pipeline.engines`, or of a foreign file."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda"`."""
        ...

    def run(self, feeds: Arrays, /) -> object:
        """Answer one call; the answer is there when it returns."""
        ...


Open = Callable[[], AbstractContextManager[Loaded]]


def time_in_turns(
    artifacts: Mapping[str, Open], feeds: Arrays, *, baseline: str, rounds: int, samples: int
) -> LatencyTable:
    """Time artifacts, and the baseline once more as `"<baseline> again"`, each in several sessions that take turns.

    After a call, the threads of an ONNX Runtime session spin for a while, on cores that the next call needs. Between
    two sessions that favours one by chance, by more than sparsity could; with several, all suffer alike.

    Args:
        artifacts: Name -> how to load it.
        feeds: What every call is given.
        baseline: The one that ratios refer to.
        rounds: Timed rounds, in each of which one session of each is called once.
        samples: How many samples `feeds` holds.
    """
    control = f"{baseline} again"
    with ExitStack() as stack:
        opened = {
            name: [stack.enter_context(load()) for _ in range(SESSIONS)]
            for name, load in {**artifacts, control: artifacts[baseline]}.items()
        }
        return measure(
            {name: _call(itertools.cycle(sessions), feeds) for name, sessions in opened.items()},
            repeats=rounds,
            warmup=max(10, rounds // 10),
            baseline=baseline,
            control=control,
            samples=samples,
            on_gpu=any(session.device == "cuda" for sessions in opened.values() for session in sessions),
        )


def _call(sessions: Iterator[Loaded], feeds: Arrays) -> Callable[[], object]:
    return lambda: next(sessions).run(feeds)
