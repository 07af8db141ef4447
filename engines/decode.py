"""JSON values to typed fields: each function takes a value and the key that a complaint names."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from tnm_pipeline.engines.errors import ArtifactRejected

T = TypeVar("T")


def require(condition: bool, complaint: str) -> None:
    """Raise `ArtifactRejected(complaint)` unless `condition` holds."""
    if not condition:
        raise ArtifactRejected(complaint)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An `object_pairs_hook` for `json.loads` that refuses a repeated key instead of keeping the last one."""
    record = dict(pairs)
    require(len(record) == len(pairs), f"a key is repeated among {[key for key, _ in pairs]}")
    return record


def no_constant(constant: str) -> object:
    """A `parse_constant` for `json.loads` that refuses NaN and infinities, which are not JSON."""
    raise ArtifactRejected(f"{constant} is not a JSON number")


def exact_keys(record: Mapping[str, object], expected: Iterable[str], where: str) -> None:
    """Refuse a record with other keys than `expected`."""
    wanted = set(expected)
    missing, unknown = sorted(wanted - set(record)), sorted(set(record) - wanted)
    require(not missing and not unknown, f"{where} lacks the keys {missing} and has the unknown keys {unknown}")


def text(value: object, key: str) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise ArtifactRejected(f"{key} must be a string, not {value!r}")


def whole(value: object, key: str) -> int:
    """An integer; Python would let `true` pass for 1."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ArtifactRejected(f"{key} must be a whole number, not {value!r}")


def truth(value: object, key: str) -> bool:
    """A boolean."""
    if isinstance(value, bool):
        return value
    raise ArtifactRejected(f"{key} must be true or false, not {value!r}")


def mapping(value: object, key: str) -> dict[str, object]:
    """A JSON object."""
    if isinstance(value, dict):
        return {str(name): item for name, item in value.items()}
    raise ArtifactRejected(f"{key} must be an object, not {value!r}")


def sequence(value: object, key: str, item: Callable[[object, str], T]) -> tuple[T, ...]:
    """A JSON list whose entries all satisfy `item`."""
    if isinstance(value, list):
        return tuple(item(entry, f"{key}[{index}]") for index, entry in enumerate(value))
    raise ArtifactRejected(f"{key} must be a list, not {value!r}")


def optional(value: object, key: str, item: Callable[[object, str], T]) -> T | None:
    """Null, or what `item` accepts."""
    return None if value is None else item(value, key)
