"""Artifacts timed against each other as production would run them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from tnm_pipeline.engines.artifact import manifest_path, read_manifest
from tnm_pipeline.export.artifacts import read_onnx
from tnm_pipeline.export.latency import LatencyTable, measure

Arrays = Mapping[str, NDArray[Any]]

_SESSIONS = 3  # of each artifact
_LARGE = 1 << 28  # bytes of an artifact of which several sessions might not fit into the memory


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


def sessions_for(paths: Iterable[Path]) -> int:
    """How many sessions of each artifact should take turns: one, where one of the artifacts is large.

    Args:
        paths: Plans with manifests, and ONNX files.
    """
    return _SESSIONS if max(map(_bytes, paths)) <= _LARGE else 1


def time_in_turns(
    artifacts: Mapping[str, Open], feeds: Arrays, *, baseline: str, rounds: int, samples: int, sessions: int
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
        sessions: Of each artifact, see `sessions_for`.
    """
    control = f"{baseline} again"
    with ExitStack() as stack:
        opened = {
            name: [stack.enter_context(load()) for _ in range(sessions)]
            for name, load in {**artifacts, control: artifacts[baseline]}.items()
        }
        return measure(
            {name: _call(itertools.cycle(loaded), feeds) for name, loaded in opened.items()},
            repeats=rounds,
            warmup=max(10, rounds // 10),
            baseline=baseline,
            control=control,
            samples=samples,
            on_gpu=any(session.device == "cuda" for loaded in opened.values() for session in loaded),
        )


def _call(sessions: Iterator[Loaded], feeds: Arrays) -> Callable[[], object]:
    return lambda: next(sessions).run(feeds)


def _bytes(path: Path) -> int:
    """Of an artifact and of the files beside it that hold weights."""
    if manifest_path(path).exists():
        manifest = read_manifest(path)
        return manifest.bytes + sum(file.bytes for file in manifest.external)
    weights: Iterable[onnx.TensorProto] = read_onnx(path).graph.initializer
    outside = (tensor for tensor in weights if tensor.data_location == onnx.TensorProto.EXTERNAL)
    names: set[str] = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)
