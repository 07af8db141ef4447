"""How much a session takes on at a time."""

from dataclasses import dataclass


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
        ValueError: A bound is not positive, or `graphs` is negative.
    """

    contexts: int = 2
    patience: float = 30.0
    queue: int = 128
    graphs: int = 8

    def __post_init__(self) -> None:
        if min(self.contexts, self.queue) < 1 or not self.patience > 0 or self.graphs < 0:
            raise ValueError(f"{self}: contexts, queue and patience must be positive, graphs at least 0")
