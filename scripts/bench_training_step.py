"""What do masks cost in time and memory? Optimizer steps of dense and sparse twins, interleaved in one process.

Every twin starts from the same weights and takes eight steps in every round, in an order that rotates; a figure is the
median over rounds of its seconds over those of the dense twin in the same round, with quartiles:

- dense again: a second dense twin, so that the noise of the comparison is seen;
- masked weight: the masks stay, nothing pulls: the product with the masked weight alone;
- masked weight, pull: pruned weights are pulled to zero as well, which is the recipe `dynamic` between two updates;
- K = 40 and K = 1: the recipe, masks recomputed every so many steps; `refresh` is the median of the seconds of an
  update, which the training's own telemetry takes, over those of so many median steps.

A step is forward, loss, backward, clipping and SGD with momentum, on random inputs: speed does not depend on them.

Then the solvers: seconds of an update of all masks, and its share of a training that updates every 40 dense steps.
The flow solver (networkx) solves some blocks only, and its seconds are scaled up by their number.

Then memory, each case in a process of its own: buffers that the masks add, what the process holds after its steps, and
its peak, beyond the dense twin's, in bytes per weight with a mask.

Usage: python scripts/bench_training_step.py [--rounds 10] [--quick] [--json PATH]
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.masks.solve import Solver
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe
from tnm_pipeline.training.sparsify import Sparsifier

PATTERN = "2:4-T"
PERIOD = 40
TURN = 8  # steps that a twin takes in a round, so that its weights are as warm in the caches as when it learns alone
ROUNDS = 2 * PERIOD // TURN
FLOW_ROWS = 32  # of a weight, and as many columns: networkx takes about a millisecond for a block
DYNAMIC = replace(RECIPES["dynamic"], freeze_at=1.0)
RECIPE_OF: dict[str, Recipe | None] = {
    "dense": None,
    "dense again": None,
    "masked weight": replace(DYNAMIC, refresh_every=None, decay=0.0),
    "masked weight, pull": replace(DYNAMIC, refresh_every=None),
    f"K = {PERIOD}": replace(DYNAMIC, refresh_every=PERIOD),
    "K = 1": replace(DYNAMIC, refresh_every=1),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network and its batch.

    Attributes:
        network: `mlp` or `cnn`.
        width: features of its layers, or channels of its widest.
        batch: samples in a step.
    """

    network: str
    width: int
    batch: int

    def build(self) -> nn.Module:
        """(batch, width) or (batch, 3, 16, 16) -> (batch, 10)."""
        width = self.width
        if self.network == "mlp":
            return nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
            )
        return nn.Sequential(
            *_block(3, width // 4, 1),
            *_block(width // 4, width // 2, 2),
            *_block(width // 2, width, 1),
            *_block(width, width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    def samples(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step."""
        shape = (self.width,) if self.network == "mlp" else (3, 16, 16)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.batch, *shape, generator=generator)
        return inputs, torch.randint(0, 10, (self.batch,), generator=generator)


CASES = (Case("mlp", 1024, 64), Case("mlp", 1024, 128), Case("mlp", 1024, 256), Case("cnn", 288, 64))
QUICK = (Case("mlp", 32, 8), Case("cnn", 16, 4))
MEMORY = Case("mlp", 4096, 64)  # large enough for the process's size to show it


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class Twin:
    """A network that learns in one way.

    Args:
        model: copied.
        recipe: None: dense.
    """

    def __init__(self, model: nn.Module, recipe: Recipe | None) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer: Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.sparsifier = Sparsifier(self.model, self.optimizer, PATTERN, recipe) if recipe else None
        self.seconds: list[float] = []

    def turn(self, inputs: Tensor, targets: Tensor) -> None:
        """Some optimizer steps, timed."""
        began = time.perf_counter()
        for _ in range(TURN):
            self.step(inputs, targets)
        self.seconds.append((time.perf_counter() - began) / TURN)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One optimizer step."""
        loss = F.cross_entropy(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def forget(self) -> None:
        """What was measured so far was warming up."""
        self.seconds.clear()
        if self.sparsifier:
            self.sparsifier.telemetry.clear()


def bench_steps(case: Case, rounds: int) -> list[Row]:
    """All twins of one case.

    Args:
        case: network and batch.
        rounds: turns of each twin; the steps in them are a multiple of the longest mask period.
    """
    torch.manual_seed(0)
    model = case.build()
    twins = {name: Twin(model, recipe) for name, recipe in RECIPE_OF.items()}
    inputs, targets = case.samples()
    order = list(twins.values())
    for index in range(1 + rounds):
        if index == 1:
            for twin in order:
                twin.forget()
        for twin in order:
            twin.turn(inputs, targets)
        order.append(order.pop(0))
    dense = twins["dense"].seconds
    rows = []
    for name, twin in twins.items():
        ratios = [own / base for own, base in zip(twin.seconds, dense, strict=True)]
        row: Row = {
            "network": case.network,
            "batch": case.batch,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "twin": name,
            "milliseconds": round(1e3 * statistics.median(twin.seconds), 3),
            "ratio_quartiles": [round(ratio, 4) for ratio in statistics.quantiles(ratios, n=4)],
        }
        if twin.sparsifier and twin.sparsifier.telemetry:
            refresh = statistics.median(refresh.seconds for refresh in twin.sparsifier.telemetry)
            steps = rounds * TURN / len(twin.sparsifier.telemetry)  # that one update is spread over
            row["refresh_milliseconds"] = round(1e3 * refresh, 3)
            row["refresh_share"] = round(refresh / steps / statistics.median(twin.seconds), 6)
        rows.append(row)
    return rows


def bench_solvers(case: Case, dense_seconds: float) -> list[Row]:
    """Updates of all masks of one case by each solver; `dense_seconds`: of a step."""
    torch.manual_seed(0)
    twin = Twin(case.build(), DYNAMIC)
    assert twin.sparsifier
    weights = [twin.model.get_submodule(name).get_parameter("weight") for name in twin.sparsifier.masks()]
    rows: list[Row] = []
    solvers: tuple[Solver, ...] = ("exact", "greedy", "flow")
    for pattern in map(Pattern.parse, (PATTERN, "4:8-T")):
        for solver in solvers:
            seconds = statistics.median(update_seconds(weights, pattern, solver) for _ in range(5))
            share = round(seconds / (seconds + PERIOD * dense_seconds), 6)
            row: Row = {"network": case.network, "batch": case.batch, "pattern": str(pattern), "solver": solver}
            rows.append(row | {"milliseconds": round(1e3 * seconds, 3), "share": share})
    return rows


def update_seconds(weights: Sequence[Tensor], pattern: Pattern, solver: Solver) -> float:
    """Seconds to solve all masks once."""
    flow_part = weights[-1].detach().flatten(1)[:FLOW_ROWS, :FLOW_ROWS].contiguous()
    solved = [flow_part] if solver == "flow" else weights
    began = time.perf_counter()
    for weight in solved:
        solve(weight, pattern, solver)
    seconds = time.perf_counter() - began
    return seconds * sum(weight.numel() for weight in weights) / sum(weight.numel() for weight in solved)


def measure_memory(case: Case, recipe: Recipe | None) -> tuple[int, int, int, int]:
    """Run in a fresh process: weights with a mask, bytes of buffers, bytes resident after three steps, and the most."""
    torch.set_num_threads(1)
    solve(torch.ones(4, 4), Pattern.parse(PATTERN))  # loads numba, for dense twins too: it is no memory of the masks
    twin = Twin(case.build(), recipe)
    for _ in range(3):
        twin.step(*case.samples())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back
    masks = twin.sparsifier.masks().values() if twin.sparsifier else ()
    buffers = twin.sparsifier.buffers().values() if twin.sparsifier else ()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    resident, peak = (1024 * int(status[field].split()[0]) for field in ("VmRSS", "VmHWM"))
    return sum(mask.numel() for mask in masks), sum(buffer.nbytes for buffer in buffers), resident, peak


def bench_memory(case: Case) -> Row:
    """Bytes that the masks add, per weight that has one."""
    measured = []
    for recipe in (None, DYNAMIC):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured.append(pool.submit(measure_memory, case, recipe).result())
    (_, _, dense, dense_peak), (weights, buffers, resident, peak) = measured
    return {
        "network": case.network,
        "weights": weights,
        "buffer_bytes": round(buffers / weights, 4),
        "resident_bytes": round((resident - dense) / weights, 4),
        "peak_bytes": round((peak - dense_peak) / weights, 4),
    }


def print_tables(steps: Sequence[Row], solvers: Sequence[Row], memory: Row) -> None:
    """Three tables."""
    print(
        f"{'network':8}{'batch':>6}{'parameters':>11}  {'twin':22}{'ms':>8}{'ratio':>8}  {'quartiles':15}{'refresh':>9}"
    )
    for row in steps:
        low, middle, high = row["ratio_quartiles"]
        share = f"{row['refresh_share']:.3%}" if "refresh_share" in row else "-"
        print(
            f"{row['network']:8}{row['batch']:>6}{row['parameters']:>11,}  {row['twin']:22}{row['milliseconds']:>8.2f}"
            f"{middle:>8.3f}  {f'{low:.3f} to {high:.3f}':15}{share:>9}"
        )
    print(f"\n{'network':8}{'batch':>6}{'pattern':>8}  {'solver':8}{'ms':>12}{f'share at K = {PERIOD}':>16}")
    for row in solvers:
        print(f"{row['network']:8}{row['batch']:>6}{row['pattern']:>8}  {row['solver']:8}", end="")
        print(f"{row['milliseconds']:>12.3f}{row['share']:>16.3%}")
    print(
        f"\nmemory beyond dense, bytes per weight ({memory['weights']:,} with masks): "
        f"buffers {memory['buffer_bytes']:.2f}, resident after steps {memory['resident_bytes']:.2f}, "
        f"peak {memory['peak_bytes']:.2f}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"a multiple of {ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="small networks: is everything in place?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < ROUNDS or options.rounds % ROUNDS:
        parser.error(f"--rounds is {options.rounds}: give a multiple of {ROUNDS}, two of the longest mask periods")
    torch.set_num_threads(1)  # so that two cores, of which one may be busy, do not add noise
    facts = {**environment(), "threads": 1, "rounds": options.rounds, "pattern": PATTERN}
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    steps: list[Row] = []
    solvers: list[Row] = []
    for case in QUICK if options.quick else CASES:
        rows = bench_steps(case, options.rounds)
        steps += rows
        solvers += bench_solvers(case, dense_seconds=rows[0]["milliseconds"] / 1e3)
    memory = bench_memory(QUICK[0] if options.quick else MEMORY)
    print_tables(steps, solvers, memory)
    if options.json:
        report = {"environment": facts, "rows": steps, "solvers": solvers, "memory": memory}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
