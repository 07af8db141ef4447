"""How much a session takes on at a time, and how long a call waits."""

import time
from dataclasses import dataclass

_LONGEST = 1e9  # seconds, 31 years: what is longer is for ever, and more than locks can wait


@dataclass(frozen=True)
class Limits:
    """Bounds of a session.

    Attributes:
        contexts: Calls that run at the same time. A TensorRT context has its own stream and device memory; ONNX
            Runtime's memory grows with the calls that run together.
        patience: Seconds that a call without a deadline waits for a context.
        queue: Calls of `submit` that may wait; one more is refused.
        graphs: CUDA graphs that a context keeps, one for each combination of input shapes; 0 for none.

    Raises:
        ValueError: A bound is not positive and finite, or `graphs` is negative.
    """

    contexts: int = 2
    patience: float = 30.0
    queue: int = 128
    graphs: int = 8

    def __post_init__(self) -> None:
        if min(self.contexts, self.queue) < 1 or not 0 < self.patience <= _LONGEST or self.graphs < 0:
            raise ValueError(
                f"{self}: contexts, queue and patience must be positive, patience at most {_LONGEST:g} s, graphs at "
                "least 0"
            )


def deadline_after(timeout: float | None) -> float | None:
    """When a call that begins to wait now gives up, by `time.monotonic()`; None for never.

    Args:
        timeout: Seconds; None or more than 31 years: never.

    Raises:
        ValueError: It is not positive.
    """
    if timeout is None:
        return None
    if not timeout > 0:  # nor is NaN
        raise ValueError(
            f"timeout is {timeout}: give a positive number of seconds, or None to wait as long as it takes"
        )
    return None if timeout > _LONGEST else time.monotonic() + timeout
