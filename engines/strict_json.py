"""The JSON of manifests: one text for one content, and nothing in it that a reader would have to guess at."""

import json
import math
from collections.abc import Mapping

from tnm_pipeline.engines.decode import require, shown
from tnm_pipeline.engines.errors import ArtifactRejected

MAX_BYTES = 8 << 20
"""Of a whole file. The manifest of a network with 10,000 sparse layers takes about 3 MiB."""

MAX_DEPTH = 32
_MAX_TEXT = 4096
_WHOLE = 1 << 63  # beyond it, readers of other languages would round


def write(record: Mapping[str, object]) -> str:
    """Canonical JSON: sorted keys, ASCII, two spaces a level, one line feed at the end.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: A value is none of JSON.
    """
    return json.dumps(record, sort_keys=True, indent=2, allow_nan=False) + "\n"


def read(text: str) -> object:
    """Parse JSON that means the same to every reader.

    Args:
        text: At most `MAX_BYTES` characters.

    Returns:
        What `json.loads` gives.

    Raises:
        ArtifactRejected: Bad syntax, a repeated key, NaN, a number beyond 64 bits, text that is not Unicode or longer
            than 4096 characters, or more than 32 levels.
    """
    require(len(text) <= MAX_BYTES, f"it has more than {MAX_BYTES:,} characters")
    try:
        content: object = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactRejected(f"not valid JSON: {error}") from error
    _check(content)
    return content


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a repeated key instead of keeping the last one."""
    record = dict(pairs)
    require(len(record) == len(pairs), f"a key is repeated among {shown([key for key, _ in pairs])}")
    return record


def _whole(digits: str) -> int:
    # The length first: Python takes quadratic time for long numbers where its own limit is switched off.
    require(len(digits) <= 20 and abs(int(digits)) < _WHOLE, f"{digits[:20]}... is beyond 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    require(math.isfinite(number), f"{digits[:20]} is beyond a double")
    return number


def _no_constant(constant: str) -> object:
    raise ArtifactRejected(f"{constant} is not a JSON number")


def _check(content: object) -> None:
    """Depth and text, without recursion: writing deep content again would exceed Python's stack."""
    level, depth = [content], 0
    while level:
        texts = [value for value in level if isinstance(value, str)]
        texts += [key for value in level if isinstance(value, dict) for key in value]
        for value in texts:
            require(len(value) <= _MAX_TEXT, f"text has more than {_MAX_TEXT} characters: {shown(value)}")
            require(_is_unicode(value), f"{value!a} is not Unicode text")
        inside = [value for value in level if isinstance(value, dict | list)]
        depth += bool(inside)
        require(depth <= MAX_DEPTH, f"it is nested more than {MAX_DEPTH} levels deep")
        level = [item for value in inside for item in (value.values() if isinstance(value, dict) else value)]


def _is_unicode(text: str) -> bool:
    """JSON can escape half of a surrogate pair, which no file name and no terminal can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
