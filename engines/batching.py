"""Dynamic batching: several calls of one row or a few become one run, whose answers are handed back row by row."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tnm_pipeline.engines.arrays import Array
from tnm_pipeline.engines.tensors import TensorSpec

Feeds: TypeAlias = Mapping[str, Any]
"""Arrays of the host's memory: those of a GPU are refused before."""

_LONGEST_DELAY = 3600.0


@dataclass(frozen=True)
class Batching:
    """When calls are joined.

    Attributes:
        max_batch: Rows of a run.
        max_delay: Seconds that a free worker waits for more calls once it has one. A call with a deadline waits for at
            most half of its time.
        pad: Input -> value that fills it up at the end where calls differ in other sizes than the batch, such as the
            length of a sentence: 0 for ids and for their attention mask. Answers are cut to the size of their call.
            Without it, only calls of equal sizes are joined. The network must ignore what is padded.
        max_padding: Share of a run that may be padding: calls of very different sizes run apart.

    Raises:
        ValueError: A bound makes no sense.
    """

    max_batch: int = 16
    max_delay: float = 0.002
    pad: Mapping[str, float] = field(default_factory=dict)
    max_padding: float = 0.2

    def __post_init__(self) -> None:
        if self.max_batch < 2 or not 0 <= self.max_delay <= _LONGEST_DELAY or not 0 <= self.max_padding < 1:
            raise ValueError(
                f"batching of max_batch = {self.max_batch} rows, max_delay = {self.max_delay} s and max_padding = "
                f"{self.max_padding}: give at least 2 rows, a time from 0 to {_LONGEST_DELAY:g} s and a share below 1, "
                "or load without batching"
            )


@dataclass(frozen=True)
class Extent:
    """How large a call or a joined run is, in the inputs that are padded.

    Attributes:
        rows: Of the batch.
        shapes: Of a row of each padded input; joined, the largest sizes.
        numbers: Elements in all rows, padding not counted.
    """

    rows: int
    shapes: tuple[tuple[int, ...], ...]
    numbers: int

    def with_(self, other: "Extent") -> "Extent":
        """Of both joined."""
        shapes = tuple(tuple(map(max, mine, theirs)) for mine, theirs in zip(self.shapes, other.shapes, strict=True))
        return Extent(self.rows + other.rows, shapes, self.numbers + other.numbers)

    def padding(self) -> float:
        """Share of the elements that are padding."""
        padded = self.rows * sum(map(math.prod, self.shapes))
        return 1 - self.numbers / padded if padded else 0.0

    def distance(self, other: "Extent") -> int:
        """How much rows differ in size."""
        return abs(sum(map(math.prod, self.shapes)) - sum(map(math.prod, other.shapes)))


@dataclass(frozen=True)
class Join:
    """The bounds of a joined run; see `Batching`."""

    max_batch: int
    max_delay: float
    max_padding: float

    def allows(self, extent: Extent) -> bool:
        """Whether a run may be so large."""
        return extent.rows <= self.max_batch and extent.padding() <= self.max_padding


class Joiner:
    """How the calls of one artifact are joined and their answers separated. Thread-safe.

    Args:
        batching: What is wanted.
        inputs: What the artifact takes.
        outputs: What it gives.

    Raises:
        ValueError: Its tensors do not all begin with one dynamic dimension; or it takes fewer rows than `max_batch`; or
            `pad` names no input, leaves one out or has a value of another type, or an output has a size that no input
            gives.
    """

    def __init__(self, batching: Batching, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        firsts = {spec.shape[0] if spec.shape else 1 for spec in (*inputs, *outputs)}
        dim = firsts.pop()
        if firsts or not isinstance(dim, str):
            shapes = {spec.name: spec.shape for spec in (*inputs, *outputs)}
            raise ValueError(f"calls cannot be joined: not all of {shapes} begin with one dynamic dimension")
        most = min((spec.ranges[dim][2] for spec in inputs if dim in spec.ranges), default=batching.max_batch)
        if most < batching.max_batch:
            raise ValueError(
                f"max_batch is {batching.max_batch}, and the plan was built for a {dim} of at most {most}: lower "
                "max_batch, or build it with a wider range"
            )
        self._pad = dict(batching.pad)
        self._inputs = {spec.name: spec for spec in inputs}
        self._crops = {spec.name: _others(spec, dim) for spec in outputs} if self._pad else {}
        if self._pad:
            self._check_pad(dim, inputs, outputs)

    def key(self, feeds: Feeds) -> Hashable:
        """Calls of equal keys can be joined. One without rows is alone: its other sizes would only cost."""
        if not self._rows(feeds):
            return object()
        return None if self._pad else tuple([array.shape[1:] for array in feeds.values()])

    def extent(self, feeds: Feeds) -> Extent:
        """How large a call is."""
        rows = self._rows(feeds)
        shapes = tuple(feeds[name].shape[1:] for name in self._pad)
        return Extent(rows, shapes, rows * sum(map(math.prod, shapes)))

    def join(self, calls: Sequence[Feeds]) -> dict[str, Array]:
        """One call of all rows, in the order of the calls; all of one key."""
        return {name: self._stack(name, [feeds[name] for feeds in calls]) for name in calls[0]}

    def split(self, answers: Mapping[str, Array], calls: Sequence[Feeds]) -> list[dict[str, Array]]:
        """The answer of each call, copied: nobody shares memory with a neighbour."""
        parts, start = [], 0
        for feeds in calls:
            end = start + self._rows(feeds)
            sizes = self._sizes(feeds)
            parts.append({name: self._cut(name, answer[start:end], sizes).copy() for name, answer in answers.items()})
            start = end
        return parts

    def _rows(self, feeds: Feeds) -> int:
        return len(next(iter(feeds.values())))

    def _stack(self, name: str, arrays: Sequence[Array]) -> Array:
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
        if all(array.shape[1:] == shape for array in arrays):
            return np.concatenate(arrays)
        joined = np.full((sum(map(len, arrays)), *shape), self._pad[name], arrays[0].dtype)
        start = 0
        for array in arrays:
            joined[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
            start += len(array)
        return joined

    def _sizes(self, feeds: Feeds) -> dict[str, int]:
        """What the dynamic dimensions of a call are."""
        if not self._pad:
            return {}
        return {
            dim: size
            for name, array in feeds.items()
            for dim, size in zip(self._inputs[name].shape, array.shape, strict=True)
            if isinstance(dim, str)
        }

    def _cut(self, name: str, rows: Array, sizes: Mapping[str, int]) -> Array:
        for axis, dim in self._crops.get(name, {}).items():
            rows = rows[(slice(None),) * axis + (slice(sizes[dim]),)]
        return rows

    def _check_pad(self, batch: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        vary = {spec.name for spec in inputs if _others(spec, batch)}
        if set(self._pad) != vary:
            raise ValueError(
                f"pad is for {sorted(self._pad)}, and the inputs of varying sizes are {sorted(vary)}: give a value for "
                "each of these, and for no other"
            )
        for name, value in self._pad.items():
            dtype = np.dtype(self._inputs[name].dtype)
            fits = dtype.kind == "f" if not math.isfinite(value) else _fits(value, dtype)
            if not fits:
                raise ValueError(f"pad fills input {name} with {value}, which its type {dtype} does not have")
        known = {dim for spec in inputs for dim in _others(spec, batch).values()}
        for spec in outputs:
            if unknown := set(_others(spec, batch).values()) - known:
                raise ValueError(
                    f"output {spec.name} has the size {sorted(unknown)}, which no input has, so what was padded cannot "
                    "be cut off: load without pad"
                )


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":
        return abs(value) <= float(np.finfo(dtype).max)
    if dtype.kind == "b":
        return value in (0, 1)
    return value == int(value) and int(np.iinfo(dtype).min) <= value <= int(np.iinfo(dtype).max)


def _others(spec: TensorSpec, batch: str) -> dict[int, str]:
    """Axis -> name of the dynamic dimensions but the batch."""
    return {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and dim != batch}
