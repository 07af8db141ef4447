"""What do masks cost in accuracy? Dense against sparse training, paired by seed, in one run.

For every seed all cases start from the same initial weights and see the same samples, alike augmented and ordered:

- dense, and dense at the learning rate of the dynamic recipe (does that rate alone explain a gap?);
- static and gradual 2:4-T: from the dense weights of this seed, trained again as long; beside them, dense likewise;
- dynamic 2:4, 2:4-T (the default) and 4:8-T, from the initial weights;
- paper 4:8-T: the setting of Hubara et al. 2021, from the initial weights; and at the learning rate of the dynamic one.

With `--search`, learning rates are chosen first, with other seeds, on a validation split held out of the training data:
for dense, for the dynamic recipe (which doubles what it is given) and for the paper's setting each its own. Without it
the rates are those that such a search chose. Test images are scored once, after the last step of a training.

The table gives the test accuracy (mean and standard deviation over seeds), the gap to dense of the same seed with its
95% interval (Student's t over the paired differences), groups that break N:M in the final W and W^T, recounted here by
plain loops, and seconds of training per seed (median). The layers that the selection skips stay dense: the classifier,
and a first layer whose inputs are no multiple of M.

Usage: python scripts/bench_accuracy.py --task digits|digits-cnn|cifar10 [--full] [--seeds 8] [--search] [--quick]
       [--data DIR] [--cache DIR] [--progress PATH] [--json PATH]
CIFAR-10 is read from cifar10.tar.xz in DIR: train/<class>/NNNN.jpg and test/<class>/NNNN.jpg; default: the variable
TNM_DATA, else ../shared/data. `--full` takes all of it and a ResNet-18, for a GPU.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from bench_accuracy_cases import CASES, DENSE, SEARCHED, Case, Row, compare, print_tables, summarise
from bench_accuracy_data import FULL, TASKS, Parts, Task, default_folder
from torch import nn
from torch.utils.data import TensorDataset

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.loop import fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.scoring import evaluate
from tnm_pipeline.training.sources import Splits

FIRST_RATE, LEAST_RATES = 0.1, 3  # a search tries at least so many rates, each twice the one before
SEARCH_SEED = 1000  # and the following: none of the benchmark's own
GLANCE = 128  # validation images that `fit` scores after each epoch, for its curves; the whole split would take long


class Progress:
    """Finished trainings, kept as lines of JSON, so that a benchmark that was stopped goes on where it was.

    Args:
        path: of the file; None: nothing is kept.
        settings: JSON-able; lines that were written for others are refused.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path | None, settings: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path and path.exists():
            first, *self.rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if first != settings:
                raise ValueError(f"{path} is of other settings: {first}, not {settings}; name another --progress file")
        elif path:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def find(self, **key: object) -> Row | None:
        """The row that has these values, if there is one."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        """Keep one and show it."""
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Bench:
    """Trains the cases of one task.

    Args:
        task: network and configuration.
        parts: its data.
        progress: what was done before.
    """

    def __init__(self, task: Task, parts: Parts, progress: Progress) -> None:
        self.task, self.parts, self.progress = task, parts, progress
        glance = TensorDataset(*parts.validation[:GLANCE])
        self.splits = Splits(parts.train, glance)
        self.dense: dict[tuple[int, float], nn.Module] = {}

    def train(self, case: Case, seed: int, lr: float) -> tuple[nn.Module, Row]:
        """One training, scored on the validation split."""
        sparsity = case.sparsity
        torch.manual_seed(seed)
        model = self.task.build()
        if case.from_dense:
            model = copy.deepcopy(self.dense_model(seed, lr))
        config = replace(self.task.config, seed=seed, lr=lr * case.lr_scale)
        began = time.perf_counter()
        result = fit(model, self.splits, config, sparsity=sparsity)
        row: Row = {"case": case.name, "seed": seed, "lr": lr, "seconds": round(time.perf_counter() - began, 2)}
        row["validation"] = evaluate(model, self.parts.validation)
        if sparsity:
            row["layers"] = list(result.masks)
            row["violations"], row["violations_transposed"] = recount(model, row["layers"], sparsity.pattern)
        return model, row

    def dense_model(self, seed: int, lr: float) -> nn.Module:
        """The trained dense network of a seed, trained again if the process that had it was stopped."""
        if (seed, lr) not in self.dense:
            self.dense[seed, lr] = self.train(CASES[0], seed, lr)[0]
        return self.dense[seed, lr]

    def search(self) -> dict[str, float]:
        """Case -> the learning rate that is best on the validation split."""
        return {case.name: self.best_rate(case) for case in CASES if case.name in SEARCHED}

    def best_rate(self, case: Case) -> float:
        """By the mean over seeds; while the largest rate is the best, the search goes on."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.task.search_seeds)
        means: dict[float, float] = {}
        best = FIRST_RATE
        while len(means) < LEAST_RATES or best == max(means):
            lr = FIRST_RATE * 2 ** len(means)
            means[lr] = statistics.mean(self.searched(case, seed, lr)["validation"] for seed in seeds)
            best = max(means, key=means.__getitem__)
        return best

    def searched(self, case: Case, seed: int, lr: float) -> Row:
        """One training of the search, unless it is done."""
        row = self.progress.find(kind="search", case=case.name, seed=seed, lr=lr)
        if row is None:
            row = {"kind": "search", **self.train(case, seed, lr)[1]}
            self.progress.add(row)
        return row

    def finished(self, case: Case, seed: int, lr: float) -> Row:
        """One training of the benchmark and its test accuracy, unless it is done."""
        row = self.progress.find(kind="final", case=case.name, seed=seed, lr=lr)
        if row is None:
            model, trained = self.train(case, seed, lr)
            if case.name == DENSE:
                self.dense[seed, lr] = model
            row = {"kind": "final", **trained, "test": evaluate(model, self.parts.test)}
            self.progress.add(row)
        return row


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


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--full", action="store_true", help="all of CIFAR-10 and a ResNet-18 (for a GPU)")
    parser.add_argument("--seeds", type=int, default=8, help="at least 2, for the interval")
    parser.add_argument("--search", action="store_true", help="choose the learning rates anew, on the validation split")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, one epoch, few images: is everything in place?"
    )
    parser.add_argument("--data", type=Path, default=default_folder(), help="folder of cifar10.tar.xz")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="folder for decoded images")
    parser.add_argument("--progress", type=Path, help="file of finished trainings, to go on after a stop")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no interval")
    if options.full and options.task != "cifar10":
        parser.error("--full is for --task cifar10")
    return options


def main() -> None:
    """Run the benchmark."""
    options = parse()
    torch.set_num_threads(1)  # small layers: more threads only add noise to the seconds
    task = FULL if options.full else TASKS[options.task]
    if options.quick:
        task = replace(task, config=replace(task.config, epochs=1), search_seeds=1)
    settings: Row = {"task": options.task, "full": options.full, "quick": options.quick, "config": asdict(task.config)}
    progress = Progress(options.progress, settings)
    bench = Bench(task, task.parts(options.data, options.cache, quick=options.quick), progress)
    rates: dict[str, float] = bench.search() if options.search else dict(zip(SEARCHED, task.rates, strict=True))
    facts = {**environment(), "threads": torch.get_num_threads(), **settings, "rates": rates}
    facts["images"] = {name: len(part) for name, part in vars(bench.parts).items()}
    for key, value in facts.items():
        print(f"{key}: {value}")
    seeds = range(2 if options.quick else options.seeds)
    trained: dict[str, list[Row]] = {case.name: [] for case in CASES}
    for seed, case in sorted(itertools.product(seeds, CASES), key=lambda pair: pair[1].from_dense):
        trained[case.name].append(bench.finished(case, seed, rates[case.rate_of]))
    dense = [100 * row["test"] for row in trained[DENSE]]
    rows = [summarise(case, trained[case.name], dense, task.config.epochs) for case in CASES]
    compared = compare(rows)
    print_tables(rows, compared)
    if options.json:
        searched = [row for row in progress.rows if row["kind"] == "search"]
        report = {"environment": facts, "rows": rows, "comparisons": compared, "search": searched}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
