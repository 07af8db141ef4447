"""Random examples of a data source, cut into batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnm_pipeline.training.convert.batch import Batch, tensors_of
from tnm_pipeline.training.sources import SourceError

_PADDING = 1.3  # the longest row of a batch over its shortest: large batches for little padding


@dataclass(frozen=True)
class Draw:
    """How many examples are taken, which ones, and how many go through the model together.

    Attributes:
        samples: how many; all where there are fewer.
        batch_size: most examples in a batch.
        seed: decides which examples.
    """

    samples: int
    batch_size: int
    seed: int

    def choose(self, count: int) -> list[int]:
        """Distinct random indices below `count`."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        chosen: list[int] = order[: self.samples].tolist()
        return chosen

    def batches(self, count: int) -> list[list[int]]:
        """The chosen indices in batches of one size, so that every example weighs the same where batches are averaged.

        The size lies between half of `batch_size` and all of it: the largest that leaves the fewest examples out.
        """
        chosen = self.choose(count)
        sizes = range((self.batch_size + 1) // 2, self.batch_size + 1)
        size = min(len(chosen), max(sizes, key=lambda size: (-(len(chosen) % size), size)))
        return [chosen[start : start + size] for start in range(0, len(chosen) - size + 1, size)] if chosen else []

    def cut(
        self, place: str, tensors: Tensor | Mapping[str, Tensor], convert: Callable[[Tensor], Tensor] | None = None
    ) -> list[Batch]:
        """Batches of the chosen examples.

        Args:
            place: where the tensors come from, for the message.
            tensors: one, or several by name; the first axis counts examples.
            convert: applied to what a batch gets; default `as_input`.

        Raises:
            SourceError: the tensors do not hold the same number of examples.
        """
        convert = convert or as_input
        batches = self.batches(check_lengths(place, tensors))
        if isinstance(tensors, Tensor):
            return [convert(tensors[rows]) for rows in batches]
        return [{name: convert(tensor[rows]) for name, tensor in tensors.items()} for rows in batches]

    def by_length(self, place: str, rows: Sequence[Mapping[str, Any]]) -> list[Batch]:
        """Batches of rows that are already chosen, in order of length.

        Rows with an `attention_mask` share a batch with somewhat shorter ones, which are padded with zeros and so left
        out; others only with rows of their own length, and a batch may be small.

        Args:
            place: where the rows come from, for the message.
            rows: for each example its values by name: numbers, or lists of them.

        Raises:
            SourceError: a value is no number.
        """
        slack = _PADDING if all("attention_mask" in row for row in rows) else 1.0
        parts: list[list[Mapping[str, Any]]] = []
        for row in sorted(rows, key=_lengths):
            first = parts[-1][0] if parts else row
            fits = all(own <= slack * least for own, least in zip(_lengths(row), _lengths(first), strict=True))
            if not parts or len(parts[-1]) == self.batch_size or not fits:
                parts.append([])
            parts[-1].append(row)
        return [
            {name: as_input(as_tensor(f"{place}: {name}", _even([row[name] for row in part]))) for name in part[0]}
            for part in parts
        ]


def _lengths(row: Mapping[str, Any]) -> list[int]:
    return [len(value) if isinstance(value, list) else 0 for value in row.values()]


def _even(values: list[Any]) -> list[Any]:
    """Lists of one length: the longest's."""
    if not all(isinstance(value, list) for value in values):
        return values
    longest = max(map(len, values))
    return [value + [0] * (longest - len(value)) for value in values]


def check_lengths(place: str, batch: Batch) -> int:
    """The number of examples, which all tensors must agree on.

    Raises:
        SourceError: they do not, or there is no tensor with a first axis.
    """
    tensors = [tensor for _, tensor in tensors_of(batch)]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors):
        raise SourceError(f"{place} must be tensors whose first axis counts examples")
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) > 1:
        raise SourceError(f"{place} has tensors of {', '.join(map(str, sorted(lengths)))} examples: give all the same")
    return lengths.pop()


def as_tensor(place: str, value: Any) -> Tensor:
    """What a source gives, as a tensor of the data type that it has.

    Raises:
        SourceError: it is no array of real numbers with an example a row.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"{place} holds something else than numbers, or rows of several lengths: {error}") from error
    if tensor.is_complex() or tensor.dim() == 0:
        raise SourceError(
            f"{place} is {tensor.dtype} of shape {tuple(tensor.shape)}: want real numbers, an example a row"
        )
    return tensor


def as_input(tensor: Tensor) -> Tensor:
    """In the data type that models take: float32, int64 or bool."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()
