"""What mask updates did to a training, and what they cost."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnm_pipeline.training.masks.change import count_change


@dataclass(frozen=True)
class Refresh:
    """One update of all masks.

    Attributes:
        step: optimizer steps done.
        flip_rate: fraction of mask entries that changed.
        kept_magnitude: sum of kept abs(w) over sum of abs(w), over all layers; 1 where all weights are zero.
        density: fraction of mask entries that are `True`.
        seconds: that the update took, these figures included.
        share: the same as a fraction of all the time since the update before, or since the Sparsifier was made or its
            state was loaded: what masks add to the steps, and to all that happens between them.
    """

    step: int
    flip_rate: float
    kept_magnitude: float
    density: float
    seconds: float
    share: float

    @classmethod
    def of(cls, step: int, changes: Sequence[Tensor], watch: "Stopwatch", interval: "Stopwatch") -> "Refresh":
        """Sum up.

        Args:
            step: optimizer steps done.
            changes: of `compare`, one per layer.
            watch: started before the update.
            interval: started after the update before.
        """
        flipped, kept, entries, kept_sum, whole_sum = torch.stack([change.cpu() for change in changes]).sum(0).tolist()
        seconds = watch.seconds()
        return cls(
            step=step,
            flip_rate=flipped / entries,
            kept_magnitude=kept_sum / whole_sum if whole_sum else 1.0,
            density=kept / entries,
            seconds=seconds,
            share=seconds / interval.seconds(),
        )


def compare(weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The sums of one layer that a `Refresh` is made of, left on the device: reading them would wait for it.

    Args:
        weight: any shape, floating.
        before: bool mask of the same shape.
        after: likewise.

    Returns:
        (5,) float64: entries that flipped, entries kept, entries, sum of kept abs(w), sum of abs(w).
    """
    if weight.device.type == "cpu":
        differing, keeping, kept, whole = count_change(weight, before, after)
        return torch.tensor([differing, keeping, after.numel(), kept, whole], dtype=torch.float64)
    magnitude = weight.detach().abs()
    sums = (
        (before ^ after).count_nonzero(),
        after.count_nonzero(),
        torch.tensor(after.numel(), device=weight.device),
        (magnitude * after).sum(dtype=torch.float32),
        magnitude.sum(dtype=torch.float32),
    )
    return torch.stack([part.double() for part in sums])


class Stopwatch:
    """Seconds since it was made. It waits for GPUs, which work on after a call returned.

    Args:
        devices: where the work to be timed is done.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._gpus = {device for device in devices if device.type == "cuda"}
        self._wait()
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Wall-clock seconds until the work given so far is done."""
        self._wait()
        return time.perf_counter() - self._began

    def _wait(self) -> None:
        for device in self._gpus:
            torch.cuda.synchronize(device)
