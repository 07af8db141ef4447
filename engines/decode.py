"""JSON values to typed fields: each function takes a value and the key that a complaint names."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from tnm_pipeline.engines.errors import ArtifactRejected

T = TypeVar("T")


def require(condition: bool, complaint: str) -> None:
    """Raise `ArtifactRejected(complaint)` unless `condition` holds."""
    if not condition:
        raise ArtifactRejected(complaint)


def shown(value: object) -> str:
    """A value for a complaint, cut where it is long: what is refused may be megabytes."""
    return reprlib.repr(value)


def exact_keys(record: Mapping[str, object], expected: Iterable[str], where: str) -> None:
    """Refuse a record with other keys than `expected`."""
    wanted = set(expected)
    missing, unknown = sorted(wanted - set(record)), sorted(set(record) - wanted)
    require(
        not missing and not unknown,
        f"{where} lacks the keys {shown(missing)} and has the unknown keys {shown(unknown)}",
    )


def text(value: object, key: str) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise ArtifactRejected(f"{key} must be a string, not {shown(value)}")


def whole(value: object, key: str) -> int:
    """An integer; Python would let `true` pass for 1."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ArtifactRejected(f"{key} must be a whole number, not {shown(value)}")


def truth(value: object, key: str) -> bool:
    """A boolean."""
    if isinstance(value, bool):
        return value
    raise ArtifactRejected(f"{key} must be true or false, not {shown(value)}")


def mapping(value: object, key: str) -> dict[str, object]:
    """A JSON object."""
    if isinstance(value, dict):
        return {str(name): item for name, item in value.items()}
    raise ArtifactRejected(f"{key} must be an object, not {shown(value)}")


def sequence(value: object, key: str, item: Callable[[object, str], T]) -> tuple[T, ...]:
    """A JSON list whose entries all satisfy `item`."""
    if isinstance(value, list):
        return tuple(item(entry, f"{key}[{index}]") for index, entry in enumerate(value))
    raise ArtifactRejected(f"{key} must be a list, not {shown(value)}")


def optional(value: object, key: str, item: Callable[[object, str], T]) -> T | None:
    """Null, or what `item` accepts."""
    return None if value is None else item(value, key)
