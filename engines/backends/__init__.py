"""One file per runtime that can execute an artifact; each is imported when an artifact asks for it."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


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

    def run(self, feeds: Mapping[str, Array], deadline: float | None = None) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: Every input by name, C-contiguous, already checked against the manifest.
            deadline: By `time.monotonic()`; a call that still waits for a context then is dropped.

        Returns:
            Every output by name, owned by the caller.

        Raises:
            FeedError: The runtime refuses these sizes.
            RunFailed: The runtime fails on these inputs; the next call is unharmed.
            Overloaded, DeadlineExceeded: No context was free.
            DeviceOutOfMemory: These sizes need more memory than the GPU has.
        """
        ...

    def close(self) -> None:
        """Free what the runtime holds. No call may be under way."""
        ...
