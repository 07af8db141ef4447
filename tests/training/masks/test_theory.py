"""docs/theory.md shows what scripts/theory.py prints; drawn figures are drawn again, fewer, and must agree."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tnm_pipeline.training.masks.gaussian import estimate_kept_magnitude
from tnm_pipeline.training.pattern import Pattern

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("theory", ROOT / "scripts" / "theory.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def lines(rows: Iterator[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


@pytest.mark.parametrize("table", ["diversity", "guarantees", "violations"])
def test_the_page_shows_what_is_computed(table: str) -> None:
    computed = lines(getattr(load_script(), table)())
    assert len(computed) > 5
    assert "\n".join([computed[0], "|---" * computed[0].count(" | ") + "|---|", *computed[1:]]) in PAGE


def test_the_page_shows_the_kept_magnitudes() -> None:
    shown = dict(re.findall(r"^\| (\S+-T) \| (\S+) ± 0\.0001 \|", PAGE, flags=re.MULTILINE))
    assert list(shown) == ["2:4-T", "4:8-T", "8:16-T", "16:32-T"]
    for text in ("2:4-T", "4:8-T"):
        drawn = estimate_kept_magnitude(Pattern.parse(text), blocks=5000, seed=1)
        assert float(shown[text]) == pytest.approx(drawn.value, abs=4 * drawn.standard_error + 1e-4)
    computed = lines(load_script().kept_magnitudes(weights=2048, seed=0))
    without_draws = [line for line in computed if "±" not in line]
    assert len(without_draws) == 6
    assert set(without_draws) <= set(PAGE.splitlines())
