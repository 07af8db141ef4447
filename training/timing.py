"""Which of two ways to do the same work takes less time: measured in turns, on any device."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_BATCH_MS = 5.0  # calls between two looks at the clock take about this long: then the looks hardly count
_MOST_CALLS = 200


@dataclass(frozen=True)
class Comparison:
    """Masked against sparse products of one layer, medians and quartiles over paired rounds, times in milliseconds.

    Attributes:
        masked_ms: forward and backward of a micro-batch.
        prepare_ms: to mask and cast the weight for it, once in an optimizer step.
        sparse_ms: forward and backward of a micro-batch.
        pack_ms: to pack the weight for it, once in an optimizer step.
        ratio: how many times faster sparse is over an optimizer step, all included.
        low: lower quartile of that.
        high: upper quartile of that.
    """

    masked_ms: float
    prepare_ms: float
    sparse_ms: float
    pack_ms: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Mapping[str, Sequence[float]], micro_batches: int) -> "Comparison":
        """Sum up.

        Args:
            times: milliseconds of `masked`, `prepare`, `sparse` and `pack`, an entry for each round, two at least.
            micro_batches: of each optimizer step.
        """
        rounds = zip(times["masked"], times["prepare"], times["sparse"], times["pack"], strict=True)
        ratios = [(m + prepare / micro_batches) / (s + pack / micro_batches) for m, prepare, s, pack in rounds]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        masked, prepare, sparse, pack = (
            statistics.median(times[name]) for name in ("masked", "prepare", "sparse", "pack")
        )
        return cls(masked, prepare, sparse, pack, ratio, low, high)

    @property
    def wins(self) -> bool:
        """Whether sparse is faster by more than the noise: in more than three quarters of the rounds."""
        return self.low > 1


def interleave(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a call of each function, all of them in each round, so that drift hits them alike.

    Args:
        functions: by name; each is called a few times first.
        device: where they work.
        rounds: one or more.
    """
    calls = {name: _calls_for(function, device) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_milliseconds(function, calls[name], device))
    return times


def _calls_for(function: Callable[[], object], device: torch.device) -> int:
    """How many calls fill a batch; the first warms up."""
    _milliseconds(function, 2, device)
    return max(1, min(_MOST_CALLS, round(_BATCH_MS / _milliseconds(function, 2, device))))


def _milliseconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call; on a GPU by its own clock, from the moment when it has nothing else to do."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - began) * 1e3 / calls
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls
