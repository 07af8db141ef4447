"""What do masks cost in accuracy? Dense against sparse training, paired by seed, in one run.

For every seed all cases start from the same initial weights and see the samples in the same order:

- dense, and dense at the learning rate of the dynamic recipe (does that rate alone explain a gap?);
- static 2:4-T: masked once from the dense weights of this seed, then trained again as long with the mask frozen;
- dynamic 2:4-T and dynamic 2:4, from the initial weights.

The table gives the test accuracy (mean and standard deviation over seeds), the gap to dense of the same seed with its
95% interval (Student's t over the paired differences), groups that break N:M in the final W and W^T, recounted here
by plain loops, and seconds of training per seed (median). The classifier and the layers that the selection skips stay
dense. Test accuracy is taken after the last epoch: no checkpoint is picked by it.

Usage: python scripts/bench_accuracy.py [--data digits] [--model digits-mlp|digits-cnn|all] [--seeds 10] [--quick]
       [--json PATH]
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]  # ships without types; a dependency of scikit-learn
from torch import nn

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.loop import FitConfig, FitResult, SparseTraining, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES
from tnm_pipeline.training.sources import Splits, load_data, load_model

MODELS: dict[str, dict[str, int]] = {"digits-mlp": {"hidden": 20}, "digits-cnn": {"channels": 8}}  # narrow: masks hurt
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: in the table.
        sparsity: None trains densely.
        lr_scale: of the dense learning rate, on top of the recipe's own.
        from_dense: start from the trained dense weights of the seed instead of the initial ones.
    """

    name: str
    sparsity: SparseTraining | None = None
    lr_scale: float = 1.0
    from_dense: bool = False


SAME_RATE = "dense, rate of dynamic"
CASES = (
    Case("dense"),
    Case(SAME_RATE, lr_scale=RECIPES["dynamic"].lr_scale),
    Case("static 2:4-T", SparseTraining(Pattern(2, 4, transposable=True), RECIPES["static"]), from_dense=True),
    Case("dynamic 2:4-T", SparseTraining(Pattern(2, 4, transposable=True), RECIPES["dynamic"])),
    Case("dynamic 2:4", SparseTraining(Pattern(2, 4), RECIPES["dynamic"])),
)


def recount(model: nn.Module, layers: Sequence[str], pattern: Pattern) -> tuple[int, int]:
    """Groups with more than N non-zeros in W and in W^T, by the definition, sharing no code with the package.

    Args:
        model: plain.
        layers: names of those that shall hold the pattern.
        pattern: N and M.

    Returns:
        Violations along the inputs and along the outputs.
    """
    along_inputs = along_outputs = 0
    for name in layers:
        weight = model.get_submodule(name).get_parameter("weight").detach().cpu().numpy()
        positions = weight.reshape(*weight.shape[:2], -1)  # (O, I, kernel positions)
        for position in range(positions.shape[2]):
            matrix = positions[:, :, position]
            along_inputs += sum(too_many(row, pattern) for row in matrix)
            along_outputs += sum(too_many(column, pattern) for column in matrix.T)
    return along_inputs, along_outputs


def too_many(line: np.ndarray, pattern: Pattern) -> int:
    """Groups of M consecutive entries with more than N non-zeros."""
    groups = (line[start : start + pattern.m] for start in range(0, len(line), pattern.m))
    return sum(int(np.count_nonzero(group)) > pattern.n for group in groups)


def interval(differences: Sequence[float]) -> float:
    """Half width of the 95% interval of the mean."""
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def train_seed(name: str, data: Splits, config: FitConfig) -> dict[str, tuple[nn.Module, FitResult, float]]:
    """Every case on one seed: case name -> trained model, result, seconds."""
    torch.manual_seed(config.seed)
    initial = load_model(name, MODELS[name])
    trained: dict[str, tuple[nn.Module, FitResult, float]] = {}
    for case in CASES:
        model = copy.deepcopy(trained["dense"][0] if case.from_dense else initial)
        began = time.perf_counter()
        result = fit(model, data, replace(config, lr=config.lr * case.lr_scale), sparsity=case.sparsity)
        trained[case.name] = model, result, time.perf_counter() - began
    return trained


def bench_model(name: str, data: Splits, config: FitConfig, seeds: int) -> list[Row]:
    """All cases of one model over all seeds."""
    runs = [train_seed(name, data, replace(config, seed=seed)) for seed in range(seeds)]
    dense = [100 * run["dense"][1].accuracy for run in runs]
    same_rate = [100 * run[SAME_RATE][1].accuracy for run in runs]
    rows: list[Row] = []
    for case in CASES:
        models, results, seconds = zip(*(run[case.name] for run in runs), strict=True)
        points = [100 * result.accuracy for result in results]
        row: Row = {
            "model": name,
            "case": case.name,
            "epochs": config.epochs * (2 if case.from_dense else 1),
            "seeds": seeds,
            "accuracy": [round(point, 4) for point in points],
            "mean": round(statistics.mean(points), 4),
            "stdev": round(statistics.stdev(points), 4),
            "seconds": round(statistics.median(seconds), 2),
        }
        for key, baseline in (("gap", dense), ("gap_same_rate", same_rate)):
            if case.name not in ("dense", SAME_RATE):
                differences = [own - other for own, other in zip(points, baseline, strict=True)]
                row |= {
                    key: round(statistics.mean(differences), 4),
                    f"{key}_interval95": round(interval(differences), 4),
                }
        if case.sparsity:
            pattern = case.sparsity.pattern
            counts = [recount(model, list(r.masks), pattern) for model, r in zip(models, results, strict=True)]
            row |= {
                "pattern": str(pattern),
                "recipe": case.sparsity.recipe.name,
                "layers": list(results[0].masks),
                "violations": sum(forward for forward, _ in counts),
                "violations_transposed": sum(transposed for _, transposed in counts),
            }
        rows.append(row)
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """One line per case; accuracy and gap in percentage points."""
    print(f"{'model':12}{'case':24}{'epochs':>7}{'mean':>8}{'stdev':>7}", end="")
    print(f"{'to dense, 95%':>16}{'at one rate, 95%':>18}{'W':>7}{'W^T':>7}{'s/seed':>8}")
    for row in rows:
        gaps = [f"{row[k]:+.2f} +- {row[f'{k}_interval95']:.2f}" if k in row else "-" for k in ("gap", "gap_same_rate")]
        print(
            f"{row['model']:12}{row['case']:24}{row['epochs']:>7}{row['mean']:>8.2f}{row['stdev']:>7.2f}"
            f"{gaps[0]:>16}{gaps[1]:>18}"
            f"{row.get('violations', '-'):>7}{row.get('violations_transposed', '-'):>7}{row['seconds']:>8.1f}"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help="a data source whose inputs the models take")
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--seeds", type=int, default=10, help="at least 2, for the interval")
    parser.add_argument("--quick", action="store_true", help="two seeds of four epochs: is everything in place?")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no interval")
    torch.set_num_threads(1)  # small layers: more threads only add noise to the seconds
    config = FitConfig(epochs=4) if arguments.quick else FitConfig()
    seeds = 2 if arguments.quick else arguments.seeds
    facts: dict[str, object] = {
        **environment(),
        "threads": torch.get_num_threads(),
        "data": arguments.data,
        "config": asdict(config),
        "models": MODELS,
    }
    for key, value in facts.items():
        print(f"{key}: {value}")
    data = load_data(arguments.data, {})
    rows: list[Row] = []
    for name in MODELS if arguments.model == "all" else (arguments.model,):
        rows += bench_model(name, data, config, seeds)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
