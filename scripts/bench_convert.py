"""Compare the conversion methods, in one run, on networks that this script trains on real scans of digits.

Two narrow networks are trained on digits (scans that ship with scikit-learn), pruned to 50% unstructured by global
magnitude, and converted to 2:4 and 2:4-T with every method: from the dense network, from the unstructured one, and
from the unstructured one with the dense network as reference. Columns:

- error: mean over layers of ||Y' - Y|| / ||Y|| on calibration data (the training set, no labels) and on the test set;
- accuracy: on the test set;
- convert s: the whole conversion, calibration included, median of the repeats, methods interleaved;
- fit s: mask, weights and bias alone, same repeats; ratio: adaprune's fit time over this method's.

A second table times least_squares against adaprune on identical statistics of larger layers.

Usage: python scripts/bench_convert.py [--data SOURCE] [--quick] [--json PATH]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.convert import METHODS, Conversion, convert, layer_errors
from tnm_pipeline.training.convert.adaprune import adaprune
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.loop import FitConfig, evaluate, fit
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.masks.prune import prune_unstructured
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import select
from tnm_pipeline.training.sources import Splits, load_data, load_model

PATTERNS = ("2:4", "2:4-T")
MODELS: dict[str, dict[str, int]] = {"digits-mlp": {"hidden": 20}, "digits-cnn": {"channels": 8}}
CALIBRATION_BATCH = 449  # a third of the training set: batches of equal size
Row = dict[str, object]


def bench_network(name: str, data: Splits, config: FitConfig, repeats: int) -> list[Row]:
    """Every method, pattern and starting point on one network."""
    torch.manual_seed(config.seed)
    dense = load_model(name, MODELS[name])
    fit(dense, data, config)
    unstructured = copy.deepcopy(dense)
    prune_unstructured(unstructured, select(dense, Pattern(2, 4)).chosen, 0.5)
    starts: dict[str, tuple[nn.Module, nn.Module]] = {  # what is converted, what sets the targets
        "dense": (dense, dense),
        "unstructured": (unstructured, unstructured),
        "unstructured, dense targets": (unstructured, dense),
    }
    rows: list[Row] = [
        {"network": name, "method": "none", "from": start, "accuracy": evaluate(model, data.test)}
        for start, (model, _) in list(starts.items())[:2]
    ]
    for start, (model, reference) in starts.items():
        for pattern in PATTERNS:
            rows += bench_methods({"network": name, "pattern": pattern, "from": start}, model, reference, data, repeats)
    return rows


def bench_methods(case: Row, model: nn.Module, reference: nn.Module, data: Splits, repeats: int) -> list[Row]:
    """All methods on one case, interleaved."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    fits: dict[str, list[float]] = {method: [] for method in METHODS}
    results: dict[str, tuple[nn.Module, Conversion]] = {}
    pattern = Pattern.parse(str(case["pattern"]))
    calibration = list(torch.split(data.train.tensors[0], CALIBRATION_BATCH))
    for _ in range(repeats):
        for method in METHODS:
            converted = copy.deepcopy(model)
            began = time.perf_counter()
            conversion = convert(converted, pattern, calibration, method=method, reference=reference)
            seconds[method].append(time.perf_counter() - began)
            fits[method].append(sum(layer.seconds for layer in conversion.layers))
            results[method] = converted, conversion
    baseline = statistics.median(fits["adaprune"])
    rows: list[Row] = []
    for method, (converted, conversion) in results.items():
        held_out = layer_errors(reference, converted, list(conversion.masks), [data.test.tensors[0]])
        rows.append(
            case
            | {
                "method": method,
                "error": conversion.mean_error,
                "held_out_error": statistics.mean(held_out.values()),
                "accuracy": evaluate(converted, data.test),
                "convert_s": statistics.median(seconds[method]),
                "fit_s": statistics.median(fits[method]),
                "ratio": baseline / statistics.median(fits[method]),
            }
        )
    return rows


def bench_layer(size: int, repeats: int) -> Row:
    """least_squares against adaprune on the same statistics of one (size, size) layer, interleaved."""
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    inputs = F.relu(torch.randn(4 * size, size, generator=generator) @ mixing + 0.3)  # correlated, like activations
    weight = torch.randn(size, size, generator=generator) / size**0.5
    objective = Objective.of(inputs, inputs @ weight.T).centred()
    mask = solve(weight, Pattern(2, 4, transposable=True))
    methods: dict[str, Callable[[], Tensor]] = {
        "least-squares": lambda: least_squares(objective, weight.double(), mask).weight,
        "adaprune": lambda: adaprune(objective, weight.double(), mask).weight,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            began = time.perf_counter()
            solution = method()
            seconds[name].append(time.perf_counter() - began)
            errors[name] = objective.relative_error(solution)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "layer": f"{size}x{size}",
        "pattern": "2:4-T",
        "least_squares_s": median["least-squares"],
        "adaprune_s": median["adaprune"],
        "ratio": median["adaprune"] / median["least-squares"],
        "ratio_spread": [round(b / a, 1) for a, b in zip(seconds["least-squares"], seconds["adaprune"], strict=True)],
        "least_squares_error": errors["least-squares"],
        "adaprune_error": errors["adaprune"],
    }


def print_table(rows: list[Row]) -> None:
    """Columns are the keys of the last row, which has them all."""
    columns = list(rows[-1])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.1f}"
    return str(value)


def main() -> None:
    """Train, prune, convert, print."""
    parser = argparse.ArgumentParser(description="Compare the conversion methods on digits.")
    parser.add_argument("--data", default="digits", help="a data source whose inputs the models take")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, one repeat, small layers")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the two methods parallelise differently; one thread compares their work
    epochs, repeats, sizes = (5, 1, (64, 128)) if arguments.quick else (40, 5, (64, 128, 256, 512))

    facts = {**environment(), "torch_threads": torch.get_num_threads(), "epochs": epochs, "models": MODELS}
    print(facts)
    data = load_data(arguments.data, {})
    rows: list[Row] = []
    for name in MODELS:
        rows += bench_network(name, data, FitConfig(epochs=epochs), repeats)
    print_table(rows)
    layers = [bench_layer(size, max(repeats // 2, 1)) for size in sizes]
    print_table(layers)
    if arguments.json:
        report = {"environment": facts, "rows": rows + layers}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
