"""How a score is written down and shown: an accuracy in percent and points, any other metric as the number it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_ACCURACY = "accuracy"
_NAMES = {"spearman": "Spearman"}  # that are not written in lower case


@dataclass(frozen=True)
class Metric:
    """What a data set is scored by.

    Attributes:
        key: the task's name of it, under which a `result.json` holds it.
    """

    key: str = _ACCURACY

    @property
    def name(self) -> str:
        """In a text."""
        return _NAMES.get(self.key, self.key)

    @property
    def title(self) -> str:
        """At the start of a sentence."""
        return self.name[0].upper() + self.name[1:]

    @property
    def scale(self) -> int:
        """What a value is multiplied with in figures: 100 for a share that is shown in percent."""
        return 100 if self.key == _ACCURACY else 1

    @property
    def axis(self) -> str:
        """Of a figure."""
        return f"{self.name}, %" if self.key == _ACCURACY else self.name

    @property
    def difference(self) -> str:
        """Title of a column of differences."""
        return "against dense, points" if self.key == _ACCURACY else "against dense"

    def text(self, value: float, digits: int = 2) -> str:
        """A value; `digits` are those of a percentage."""
        return f"{value:.{digits}%}" if self.key == _ACCURACY else f"{value:.{digits + 2}f}"

    def gap(self, difference: float, digits: int = 2) -> str:
        """A difference of two values, in points for an accuracy."""
        return f"{100 * difference:+.{digits}f}" if self.key == _ACCURACY else f"{difference:+.{digits + 2}f}"


def metric_of(results: Iterable[Mapping[str, Any]]) -> Metric:
    """The metric of a run's stages, of which each names it if it scored anything."""
    return Metric(next((result["metric"] for result in results if "metric" in result), _ACCURACY))


def score_of(result: Mapping[str, Any]) -> float | None:
    """A stage's score; None where nothing could be scored."""
    score: float | None = result[metric_of([result]).key]
    return score
