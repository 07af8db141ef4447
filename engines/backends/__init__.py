"""One file per runtime that can execute an artifact; each is imported when an artifact asks for it."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


class Backend(Protocol):
    """What a session needs from a runtime. One thread at a time."""

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda"`: where the network runs."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: Every input by name, C-contiguous, already checked against the manifest.

        Returns:
            Every output by name, owned by the caller.
        """
        ...

    def close(self) -> None:
        """Free what the runtime holds."""
        ...
