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


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an artifact.

    Attributes:
        name: The tensor's name in the graph.
        dtype: A numpy name, one of `DTYPES`.
        shape: One entry per dimension: a size, or the name of a dynamic dimension (`"batch"`).
        ranges: Dimension name -> (min, opt, max) sizes that the engine was built for; empty where any goes.

    Raises:
        ArtifactRejected: The values contradict each other.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    ranges: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"tensor {self.name!r}"
        decode.require(bool(self.name), "a tensor has an empty name")
        decode.require(self.dtype in DTYPES, f"{where} has dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for size in self.shape:
            decode.require(size != "" and (isinstance(size, str) or size >= 0), f"{where} has the dimension {size!r}")
        for dim, (low, best, high) in self.ranges.items():
            decode.require(
                dim in self.shape, f"{where} has a range for {dim!r}, which is not in its shape {self.shape}"
            )
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
    ranges = decode.mapping(record["ranges"], f"{key}.ranges")
    return TensorSpec(
        name=decode.text(record["name"], f"{key}.name"),
        dtype=decode.text(record["dtype"], f"{key}.dtype"),
        shape=decode.sequence(record["shape"], f"{key}.shape", _size),
        ranges={dim: _range(sizes, f"{key}.ranges.{dim}") for dim, sizes in ranges.items()},
    )


def _size(value: object, key: str) -> int | str:
    return value if isinstance(value, str) else decode.whole(value, key)


def _range(value: object, key: str) -> tuple[int, int, int]:
    sizes = decode.sequence(value, key, decode.whole)
    if len(sizes) == 3:
        return sizes[0], sizes[1], sizes[2]
    raise ArtifactRejected(f"{key} must be [min, opt, max], not {value!r}")
