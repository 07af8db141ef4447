"""The cases of `bench_accuracy.py`, and the tables that their trainings become."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats  # type: ignore[import-untyped]  # ships without types; a dependency of scikit-learn

from tnm_pipeline.training.loop import SparseTraining
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: in the table.
        rate_of: name of the case whose learning rate it takes.
        sparsity: None trains densely.
        lr_scale: of that rate, on top of the recipe's own.
        from_dense: it begins with the trained dense weights of its seed, so that it trains twice as long.
    """

    name: str
    rate_of: str
    sparsity: SparseTraining | None = None
    lr_scale: float = 1.0
    from_dense: bool = False


def sparse_case(recipe: str, pattern: str, rate_of: str) -> Case:
    """A case named after its recipe and its pattern."""
    sparsity = SparseTraining(Pattern.parse(pattern), RECIPES[recipe])
    return Case(f"{recipe} {pattern}", rate_of, sparsity, from_dense=sparsity.recipe.from_dense)


DENSE, DEFAULT, PAPER = "dense", "dynamic 2:4-T", "paper 4:8-T"
DENSE_SAME_RATE, PAPER_SAME_RATE = f"{DENSE}, rate of dynamic", f"{PAPER}, rate of dynamic"
DENSE_AGAIN = f"{DENSE}, trained again"
SCALE = RECIPES["dynamic"].lr_scale
CASES = (
    Case(DENSE, DENSE),
    Case(DENSE_SAME_RATE, DEFAULT, lr_scale=SCALE),
    sparse_case("dynamic", "2:4-T", DEFAULT),
    sparse_case("paper", "4:8-T", PAPER),
    replace(sparse_case("paper", "4:8-T", DEFAULT), name=PAPER_SAME_RATE, lr_scale=SCALE),
    sparse_case("dynamic", "4:8-T", DEFAULT),
    sparse_case("dynamic", "2:4", DEFAULT),
    Case(DENSE_AGAIN, DENSE, from_dense=True),
    sparse_case("gradual", "2:4-T", DENSE),
    sparse_case("static", "2:4-T", DENSE),
)
COMPARED = (
    (DEFAULT, DENSE),
    (DEFAULT, DENSE_SAME_RATE),
    (DEFAULT, PAPER),
    (DEFAULT, PAPER_SAME_RATE),
    ("dynamic 4:8-T", "dynamic 2:4"),
    ("gradual 2:4-T", DENSE_AGAIN),
    ("static 2:4-T", DENSE_AGAIN),
)
SEARCHED: tuple[str, ...] = (DENSE, DEFAULT, PAPER)


def gap(points: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences and the half width of its 95% interval."""
    differences = [own - other for own, other in zip(points, baseline, strict=True)]
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    width = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return round(statistics.mean(differences), 4), round(width, 4)


def summarise(case: Case, trained: Sequence[Row], dense: Sequence[float], epochs: int) -> Row:
    """One row of the table from the trainings of a case, a seed each."""
    points = [round(100 * row["test"], 4) for row in trained]
    summary: Row = {
        "case": case.name,
        "lr": trained[0]["lr"] * case.lr_scale * (case.sparsity.recipe.lr_scale if case.sparsity else 1.0),
        "epochs": epochs * (2 if case.from_dense else 1),
        "accuracy": points,
        "mean": round(statistics.mean(points), 4),
        "stdev": round(statistics.stdev(points), 4),
        "validation": round(100 * statistics.mean(row["validation"] for row in trained), 4),
        "seconds": statistics.median(row["seconds"] for row in trained),
    }
    if case.name != DENSE:
        summary["gap"], summary["gap_interval95"] = gap(points, dense)
    if case.sparsity:
        summary |= {"pattern": str(case.sparsity.pattern), "layers": trained[0]["layers"]}
        summary |= {key: sum(row[key] for row in trained) for key in ("violations", "violations_transposed")}
    return summary


def compare(rows: Sequence[Row]) -> list[Row]:
    """The differences that the benchmark is there for."""
    points = {row["case"]: row["accuracy"] for row in rows}
    keys = ("gap", "interval95")
    return [
        {"case": case, "baseline": baseline} | dict(zip(keys, gap(points[case], points[baseline]), strict=True))
        for case, baseline in COMPARED
    ]


def print_tables(rows: Sequence[Row], compared: Sequence[Row]) -> None:
    """One line per case and per comparison; accuracy and gap in percentage points."""
    print(
        f"{'case':30}{'peak lr':>8}{'epochs':>7}{'mean':>8}{'stdev':>7}{'to dense, 95%':>18}{'W':>5}{'W^T':>7}{'s':>8}"
    )
    for row in rows:
        to_dense = f"{row['gap']:+.2f} +- {row['gap_interval95']:.2f}" if "gap" in row else "-"
        print(
            f"{row['case']:30}{row['lr']:>8.3g}{row['epochs']:>7}{row['mean']:>8.2f}{row['stdev']:>7.2f}{to_dense:>18}"
            f"{row.get('violations', '-'):>5}{row.get('violations_transposed', '-'):>7}{row['seconds']:>8.1f}"
        )
    for row in compared:
        print(f"{row['case']} - {row['baseline']}: {row['gap']:+.2f} +- {row['interval95']:.2f}")
