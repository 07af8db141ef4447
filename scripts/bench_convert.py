"""Compare the conversion methods, in one run, on networks that this script trains on real scans of digits.

Two narrow networks are trained on half of scikit-learn's digits, pruned to 50% unstructured by global magnitude,
and converted to 2:4 and 2:4-T with every method: from the dense network, from the unstructured one, and from the
unstructured one with the dense network as reference. Columns:

- error: mean over layers of ||Y' - Y|| / ||Y|| on calibration data (training half, no labels) and held-out data;
- accuracy: on the held-out half;
- convert s: the whole conversion, calibration included, median of the repeats, methods interleaved;
- fit s: mask, weights and bias alone, same repeats; ratio: adaprune's fit time over this method's.

A second table times least_squares against adaprune on identical statistics of larger layers.

Usage: python scripts/bench_convert.py [--quick] [--json PATH]
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert import METHODS, Conversion, convert, layer_errors
from tnm_pipeline.training.convert.adaprune import adaprune
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ("2:4", "2:4-T")
CALIBRATION_BATCH = 128
Row = dict[str, object]


def mlp(width: int = 32) -> nn.Module:
    """64-h-h-10, narrow enough that masks hurt."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def conv_net(width: int = 16) -> nn.Module:
    """Three convolutions with batch norms, the first on one channel (never converted), and a classifier."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *block(1, width, 1),
        *block(width, width, 2),
        *block(width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Plain Adam on shuffled batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[index]), labels[index]))
            optimizer.step()
    model.eval()


@torch.no_grad()
def prune_unstructured(model: nn.Module, fraction: float = 0.5) -> None:
    """Zero the smallest weights of all Linear and Conv2d layers together."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    threshold = torch.cat([weight.abs().flatten() for weight in weights]).quantile(fraction)
    for weight in weights:
        weight.masked_fill_(weight.abs() <= threshold, 0.0)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of right answers."""
    return float((model(images).argmax(1) == labels).float().mean())


def bench_network(
    name: str, dense: nn.Module, calibration: list[Tensor], images: Tensor, labels: Tensor, repeats: int
) -> list[Row]:
    """Every method, pattern and starting point on one network."""
    unstructured = copy.deepcopy(dense)
    prune_unstructured(unstructured)
    starts: dict[str, tuple[nn.Module, nn.Module]] = {  # what is converted, what sets the targets
        "dense": (dense, dense),
        "unstructured": (unstructured, unstructured),
        "unstructured, dense targets": (unstructured, dense),
    }
    rows: list[Row] = [
        {"network": name, "method": "none", "from": start, "accuracy": accuracy(model, images, labels)}
        for start, (model, _) in list(starts.items())[:2]
    ]
    for start, (model, reference) in starts.items():
        for pattern in PATTERNS:
            rows += bench_methods(
                {"network": name, "pattern": pattern, "from": start},
                model,
                reference,
                calibration,
                images,
                labels,
                repeats,
            )
    return rows


def bench_methods(
    case: Row,
    model: nn.Module,
    reference: nn.Module,
    calibration: list[Tensor],
    images: Tensor,
    labels: Tensor,
    repeats: int,
) -> list[Row]:
    """All methods on one case, interleaved."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    fits: dict[str, list[float]] = {method: [] for method in METHODS}
    results: dict[str, tuple[nn.Module, Conversion]] = {}
    pattern = Pattern.parse(str(case["pattern"]))
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
        names = list(conversion.masks)
        held_out = layer_errors(reference, converted, names, [images])
        rows.append(
            case
            | {
                "method": method,
                "error": conversion.mean_error,
                "held_out_error": statistics.mean(held_out.values()),
                "accuracy": accuracy(converted, images, labels),
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


def environment() -> Row:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
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
    parser.add_argument("--quick", action="store_true", help="fewer epochs, one repeat, small layers")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the two methods parallelise differently; one thread compares their work
    epochs, repeats, sizes = (5, 1, (64, 128)) if arguments.quick else (20, 5, (64, 128, 256, 512))

    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits))
    images = (torch.tensor(pixels, dtype=torch.float32) / 16)[order].reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits)[order]
    half = len(images) // 2
    calibration = list(torch.split(images[:half], CALIBRATION_BATCH))
    print(environment())
    rows: list[Row] = []
    for name, make in (("mlp", mlp), ("conv-bn", conv_net)):
        torch.manual_seed(0)
        dense = make()
        train(dense, images[:half], labels[:half], epochs)
        rows += bench_network(name, dense, calibration, images[half:], labels[half:], repeats)
    print_table(rows)
    layers = [bench_layer(size, max(repeats // 2, 1)) for size in sizes]
    print_table(layers)
    if arguments.json:
        report = {"environment": environment(), "rows": rows + layers}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
