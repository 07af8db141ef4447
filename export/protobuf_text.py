"""Protobuf's text format, written without protobuf: what `config.pbtxt` of Triton Inference Server is made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, Union

Item: TypeAlias = Union[bool, int, str, "Message"]
Value: TypeAlias = Item | Sequence[Item]
Message: TypeAlias = Mapping[str, Value]
"""Field name -> value; a sequence is a repeated field, a map's entry is `{"key": ..., "value": ...}`."""

_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}


class EnumName(str):
    """The name of an enum's value, which stands without quotes."""

    __slots__ = ()


def to_text(message: Message) -> str:
    """Write a message, one field or closing brace a line.

    Args:
        message: Fields in the order in which they shall stand.

    Returns:
        ASCII; strings are escaped byte by byte where they are not.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        for item in [value] if isinstance(value, (bool, int, str, Mapping)) else value:
            if isinstance(item, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(item))
                yield "}"
            else:
                yield f"{name}: {_scalar(item)}"


def _scalar(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, EnumName):
        return f'"{"".join(map(_escaped, value.encode()))}"'
    return str(value)


def _escaped(byte: int) -> str:
    """One byte of a string: itself if it is printable ASCII, else three octal digits."""
    return _ESCAPES.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
