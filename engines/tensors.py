"""What a manifest states of one input or output."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from tnm_pipeline.engines import decode
from tnm_pipeline.engines.errors import ArtifactRejected

DTYPES = (
    "bool",
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


Ranges = Mapping[str, tuple[int, int, int]]
"""Name of a dynamic dimension -> its (min, opt, max) sizes."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an artifact.

    Attributes:
        name: The tensor's name in the graph.
        dtype: A numpy name, one of `DTYPES`.
        shape: One entry per dimension: a size, or the name of a dynamic dimension (`"batch"`).
        ranges: Sizes that the engine was built for, over all its profiles; empty where any goes.

    Raises:
        ArtifactRejected: The values contradict each other.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    ranges: Ranges = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"tensor {self.name!r}"
        decode.require(bool(self.name), "a tensor has an empty name")
        decode.require(self.dtype in DTYPES, f"{where} has dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for size in self.shape:
            decode.require(size != "" and (isinstance(size, str) or size >= 0), f"{where} has the dimension {size!r}")
        check_ranges(self.ranges, where)
        for dim in self.ranges:
            decode.require(
                dim in self.shape, f"{where} has a range for {dim!r}, which is not in its shape {self.shape}"
            )


def check_ranges(ranges: Ranges, where: str) -> None:
    """Refuse ranges that are not min <= opt <= max; `where` is what a complaint names.

    Raises:
        ArtifactRejected: One of them is not.
    """
    for dim, (low, best, high) in ranges.items():
        decode.require(
            0 <= low <= best <= high,
            f"{where}: the range of {dim!r} is not min <= opt <= max: {low, best, high}",
        )


def tensor_spec(value: object, key: str) -> TensorSpec:
    """Read one entry of a manifest's `inputs` or `outputs`; `key` is what a complaint names.

    Raises:
        ArtifactRejected: Unknown or missing keys, wrong types, or values that contradict each other.
    """
    record = decode.mapping(value, key)
    decode.exact_keys(record, [f.name for f in fields(TensorSpec)], key)
    return TensorSpec(
        name=decode.text(record["name"], f"{key}.name"),
        dtype=decode.text(record["dtype"], f"{key}.dtype"),
        shape=decode.sequence(record["shape"], f"{key}.shape", _size),
        ranges=read_ranges(record["ranges"], f"{key}.ranges"),
    )


def read_ranges(value: object, key: str) -> Ranges:
    """Read the ranges of a tensor or of a profile; `key` is what a complaint names.

    Raises:
        ArtifactRejected: Not an object of lists of three whole numbers.
    """
    return {dim: _range(sizes, f"{key}.{dim}") for dim, sizes in decode.mapping(value, key).items()}


def _size(value: object, key: str) -> int | str:
    return value if isinstance(value, str) else decode.whole(value, key)


def _range(value: object, key: str) -> tuple[int, int, int]:
    sizes = decode.sequence(value, key, decode.whole)
    if len(sizes) == 3:
        return sizes[0], sizes[1], sizes[2]
    raise ArtifactRejected(f"{key} must be [min, opt, max], not {value!r}")
