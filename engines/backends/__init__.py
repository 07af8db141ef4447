"""One file per runtime that can execute an artifact; each is imported when an artifact asks for it."""

from collections.abc import Mapping
from typing import Any, Protocol

from tnm_pipeline.engines.arrays import Array, Feed

__all__ = ["Array", "Backend", "Feed"]


class Backend(Protocol):
    """What a session needs from a runtime. Any number of threads at a time."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda"`: where the network runs."""
        ...

    @property
    def version(self) -> str:
        """The runtime's release."""
        ...

    def run(
        self, feeds: Mapping[str, Feed], deadline: float | None = None, *, on_device: bool = False
    ) -> dict[str, Any]:
        """Run the network once.

        Args:
            feeds: Every input by name, C-contiguous, already checked against the manifest.
            deadline: By `time.monotonic()`; a call that still waits for a context then is dropped.
            on_device: Leave the outputs on the GPU.

        Returns:
            Every output by name, complete and owned by the caller: numpy arrays, or `DeviceArray` with `on_device`.

        Raises:
            FeedError: The runtime refuses these sizes, or arrays on this GPU.
            RunFailed: The runtime fails on these inputs; the next call is unharmed.
            Overloaded, DeadlineExceeded: No context was free.
            DeviceOutOfMemory: These sizes need more memory than the GPU has.
            CudaError: The driver fails, as after a fault in any kernel of the process: load again in a new one.
        """
        ...

    def warm_up(self) -> None:
        """Run before the first call what would make it slow. No call may be under way.

        Raises:
            As `run`, where the network cannot run at sizes that its manifest promises.
        """
        ...

    def describe(self) -> dict[str, object]:
        """Facts of how it runs, for a person or a log: values that JSON has."""
        ...

    def close(self) -> None:
        """Free what the runtime holds. No call may be under way."""
        ...
