"""CUDA graphs: work that was queued once, captured, and launched again as a whole.

A graph has the addresses and sizes of its capture in it. Whoever launches it answers for their still being valid.
"""

from collections.abc import Callable, Hashable
from ctypes import byref, c_void_p
from typing import Generic, Protocol, TypeVar

from tnm_pipeline.engines.cuda import CudaDriver, CudaError
from tnm_pipeline.engines.errors import DeviceOutOfMemory, RunFailed

# cuda.h: other threads may go on to allocate memory while this one captures
_CAPTURE_THREAD_LOCAL = 1

_REFUSALS_KEPT = 256


class CaptureRefused(RuntimeError):
    """Work cannot be captured, for the reason in the message. Nothing of it has run, and the stream is usable."""


class CudaGraph:
    """An executable graph, to be launched on one stream at a time."""

    def __init__(self, driver: CudaDriver, executable: c_void_p) -> None:
        self._driver = driver
        self._executable = executable

    def launch(self, stream: int) -> None:
        """Queue all of it."""
        self._driver.call("cuGraphLaunch", self._executable, stream)

    def destroy(self) -> None:
        """Free it; it must not be under way."""
        self._driver.call("cuGraphExecDestroy", self._executable)


def capture(driver: CudaDriver, stream: int, queue: Callable[[], None]) -> CudaGraph:
    """Make a graph of what `queue` queues on `stream`, without running it.

    Args:
        driver: The driver; the context of `stream` is current.
        stream: Not the default stream, and nothing else is being captured on it.
        queue: Queues the work; what it raises ends the capture.

    Raises:
        CaptureRefused: The work synchronises or allocates, or the driver cannot make a graph of it.
    """
    graph, executable = c_void_p(), c_void_p()
    try:
        driver.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)
        try:
            queue()
        finally:
            driver.call("cuStreamEndCapture", stream, byref(graph))
        driver.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
    except (CudaError, DeviceOutOfMemory, RunFailed) as error:
        raise CaptureRefused(str(error.__context__ or error)) from error
    finally:
        if graph:
            driver.call("cuGraphDestroy", graph)
    return CudaGraph(driver, executable)


class Destroyable(Protocol):
    """What a `GraphCache` keeps."""

    def destroy(self) -> None:
        """Free it."""
        ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Destroyable)


class GraphCache(Generic[K, V]):
    """The graphs of the keys used last, at most `limit`. One thread at a time; `len` and `refusals` any.

    A key is worth a graph when it comes back within the last `limit` others: one that is seen once would pay for a
    capture and never use it, and more keys in turn than there is room for would throw graphs out as fast as they
    are made.

    Args:
        limit: Graphs to keep; with 0, no key is worth one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # In the order of their last use.
        self._kept: dict[K, V] = {}
        self._seen: dict[K, None] = {}
        self._refused: dict[K, str] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why keys have no graph, one reason for each."""
        return tuple(self._refused.values())

    def get(self, key: K) -> V | None:
        """The graph of `key`, which becomes the one used last."""
        graph = self._kept.pop(key, None)
        if graph is not None:
            self._kept[key] = graph
        return graph

    def worth(self, key: K) -> bool:
        """Note a use of `key`, which has no graph; whether to make one now."""
        if not self._limit or key in self._refused:
            return False
        seen = key in self._seen
        self._seen.pop(key, None)
        if not seen:
            self._seen[key] = None
            _shorten(self._seen, self._limit)
        return seen

    def keep(self, key: K, graph: V) -> None:
        """Keep a graph; the one that was not used for longest is destroyed where there is no more room."""
        self._kept[key] = graph
        for oldest in _shorten(self._kept, self._limit):
            oldest.destroy()

    def refuse(self, key: K, reason: str) -> None:
        """Never try `key` again."""
        self._refused[key] = reason
        _shorten(self._refused, _REFUSALS_KEPT)

    def clear(self) -> None:
        """Destroy every graph; their keys have to come back twice again. Refusals stay."""
        kept, self._kept = self._kept, {}
        for graph in kept.values():
            graph.destroy()


T = TypeVar("T")


def _shorten(entries: dict[K, T], limit: int) -> list[T]:
    """Drop the oldest entries beyond `limit`."""
    return [entries.pop(key) for key in list(entries)[: max(0, len(entries) - limit)]]
