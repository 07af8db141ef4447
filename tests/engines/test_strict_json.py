import json
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnm_pipeline.engines import ArtifactRejected, strict_json


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ('{"a": 1, "a": 2}', "a key is repeated"),
        ("NaN", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1e999", "beyond a double"),  # json.loads makes it infinite
        (str(1 << 63), "beyond 64 bits"),
        ("-" + "9" * 5_000, "beyond 64 bits"),
        (r'"\ud800"', "not Unicode text"),
        (r'{"\udfff": 1}', "not Unicode text"),
        ('"' + "a" * 4097 + '"', "more than 4096 characters"),
        ("[" * 33 + "]" * 33, "more than 32 levels"),
        ("[" * 400 + "]" * 400, "more than 32 levels"),  # deeper than json.dumps can write
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_not_plain_json_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ArtifactRejected, match=complaint):
        strict_json.read(text)


def test_a_text_beyond_the_limit_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ArtifactRejected, match="more than 8,388,608 characters"):
        strict_json.read(" " * (strict_json.MAX_BYTES + 1))


@pytest.fixture
def no_limit_on_digits() -> Iterator[None]:
    """As an application sets it that computes with long numbers."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


@pytest.mark.usefixtures("no_limit_on_digits")
def test_a_number_of_millions_of_digits_is_refused_unconverted() -> None:
    with pytest.raises(ArtifactRejected, match="beyond 64 bits"):
        strict_json.read("9" * 2_000_000)  # to convert it takes minutes


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


def test_as_many_levels_as_allowed_are_read() -> None:
    strict_json.read("[" * 31 + '{"a": 1}' + "]" * 31)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), PLAIN))
def test_what_is_written_is_read_again(record: dict[str, object]) -> None:
    text = strict_json.write(record)
    assert text.isascii()
    assert strict_json.read(text) == record


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(ArtifactRejected):
        strict_json.read(text)
