"""Reading, writing and refusing patterns."""

import pytest

from tnm_pipeline.training.pattern import Pattern, PatternError


@pytest.mark.parametrize("text", ["2:4", "2:4-T", "1:4", "16:32-T"])
def test_text_form_round_trips(text: str) -> None:
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["5:4", "4:4", "0:4", "33:64", "2-4", "2:4-t", "", "-1:4", "2:4:T", "124"])
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match="2:4"):
        Pattern.parse(text)
