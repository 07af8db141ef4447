"""What only a GPU can show of the loader: that its answers are right there, and what contexts, graphs and copies cost.

It has not run on a GPU yet: on a machine without one only `--quick` was tried, which is ONNX Runtime on the CPU.

Random networks (those of gpu_export.py) in fp32, in tensorrt, tensorrt_rtx and ONNX Runtime on CUDA. Questions:

- answers: the largest difference from ONNX Runtime on the CPU, relative to the largest output, over all batches, from
  eight threads at once, with graphs and without;
- contexts: samples a second from eight threads that share 1, 2 or 4 contexts, in turns;
- graphs: a call with CUDA graphs against one without (tensorrt captures ours, tensorrt_rtx its own);
- arrays: a call whose input is a CUDA tensor and whose output stays there, against numpy in and out;
- pinned, of no network: a copy to the GPU through page-locked memory, the copy into that included, or a pageable one;
- load: seconds from a fresh process to the first answer; tensorrt_rtx with and without the kernels of the last one.

Two ways of one thing are timed in turns, with the baseline loaded once more as a control: medians in microseconds,
spread (75th minus 25th percentile), ratio and its 95% interval, as `tnm-pipeline bench` does.

Usage: python scripts/gpu_engines.py [--quick] [--only WAY] [--json docs/benchmarks/engines_GPU_DATE.json]
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_engines_cases import Case, Way, backend, make, timed
from gpu_export_networks import networks

from tnm_pipeline.engines.arrays import as_feed
from tnm_pipeline.engines.artifact import read_verified
from tnm_pipeline.engines.backends import Backend
from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.latency import LatencyTable

NO_GPU = 4
WAYS: tuple[Way, ...] = ("tensorrt", "tensorrt_rtx", "onnxruntime")
THREADS = 8
Row = dict[str, Any]

# Of a process without torch. On standard output: seconds to load, and from there to the first answer.
FIRST_ANSWER = """
import time
begun = time.perf_counter()
import sys
from pathlib import Path
import numpy as np
from tnm_pipeline.engines import Limits
from tnm_pipeline.engines.artifact import read_verified
from tnm_pipeline.engines.driver import probe
content = read_verified(Path(sys.argv[1]))
manifest, options = content.manifest, {"driver": probe(), "limits": Limits(contexts=1)}
if manifest.backend == "onnxruntime":
    from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend
    network = OnnxRuntimeBackend(manifest, content.artifact, weights=content.external, device=sys.argv[2], **options)
else:
    from tnm_pipeline.engines.backends.tensorrt import TensorRTBackend
    network = TensorRTBackend(manifest, content.artifact, **options)
loaded = time.perf_counter()
network.run({
    spec.name: np.zeros([1 if isinstance(size, str) else size for size in spec.shape], spec.dtype)
    for spec in manifest.inputs
})
print(loaded - begun, time.perf_counter() - loaded)
network.close()
"""


def answers(case: Case) -> Iterator[Row]:
    """Right, from many threads, with graphs and without."""
    with ExitStack() as stack:
        reference = stack.enter_context(closing(backend(case.source, "cpu")))
        batches = [case.network.batches[turn % len(case.network.batches)] for turn in range(8 if case.quick else 64)]
        expected = {batch: _only(reference.run(case.feeds(batch))) for batch in set(batches)}
        for graphs in (0, 8):
            network = stack.enter_context(closing(case.load(contexts=3, graphs=graphs)))
            with ThreadPoolExecutor(THREADS) as pool:
                given = list(pool.map(lambda batch: _only(network.run(case.feeds(batch))), batches))  # noqa: B023
            errors = [
                float(np.abs(answer - expected[batch]).max() / np.abs(expected[batch]).max())
                for batch, answer in zip(batches, given, strict=True)
            ]
            yield {"graphs": graphs, "calls": len(batches), "error": max(errors), "facts": network.describe()}


def contexts(case: Case) -> Iterator[Row]:
    """Throughput of threads that share contexts."""
    calls, rounds = (2, 2) if case.quick else (200, 7)
    batch = case.network.batches[0]
    feeds = case.feeds(batch)
    with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        sizes = (1, 2, 4)
        backends = {size: stack.enter_context(closing(case.load(contexts=size))) for size in sizes}
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(rounds):
            for size, network in backends.items():

                def work(_: int, network: Backend = network) -> None:
                    for _ in range(calls):
                        network.run(feeds)

                begun = time.perf_counter()
                list(pool.map(work, range(THREADS)))
                rates[size].append(THREADS * calls * batch / (time.perf_counter() - begun))
    for size in sizes:
        ratios = [rate / one for rate, one in zip(rates[size], rates[1], strict=True)]
        yield {
            "contexts": size,
            "batch": batch,
            "samples_per_s": statistics.median(rates[size]),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }


def graphs(case: Case) -> Iterator[Row]:
    """A call with CUDA graphs against one without."""
    with ExitStack() as stack:
        kept = {"plain": 0, "graphs": 8, "control": 0}
        backends = {
            name: stack.enter_context(closing(case.load(contexts=1, graphs=count))) for name, count in kept.items()
        }
        for batch in case.network.batches:
            feeds = case.feeds(batch)
            calls = {name: partial(network.run, feeds) for name, network in backends.items()}
            yield {"batch": batch, **_figures(timed("plain", calls, batch, quick=case.quick), "graphs")}


def arrays(case: Case) -> Iterator[Row]:
    """A call that stays on the GPU against numpy in and out."""
    spec = read_verified(case.path).manifest.inputs[0]
    with closing(case.load(contexts=1)) as network:
        for batch in case.network.batches:
            feeds = case.feeds(batch)
            there = {spec.name: as_feed(spec, self_owned := torch.from_numpy(feeds[spec.name]).cuda())}
            torch.cuda.synchronize()
            calls = {
                "numpy": partial(network.run, feeds),
                "device": partial(network.run, there, on_device=True),
                "control": partial(network.run, feeds),
            }
            yield {"batch": batch, **_figures(timed("numpy", calls, batch, quick=case.quick), "device")}
            del self_owned


def pinned() -> Iterator[Row]:
    """Copies to the GPU, and nothing else."""
    device = Device(CudaDriver())
    try:
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26):
            given = np.ones(size, np.uint8)

            def pageable(given: Any = given, size: int = size) -> None:
                with device.current():
                    device.upload(device.reserve("x", size), given)
                    device.synchronize()

            def through(given: Any = given, size: int = size) -> None:
                with device.current():
                    staging = device.staging("x", size)
                    np.copyto(staging, given)
                    device.upload(device.reserve("x", size), staging)
                    device.synchronize()

            table = timed("pageable", {"pageable": pageable, "pinned": through, "control": pageable}, 1, quick=False)
            yield {"bytes": size, **_figures(table, "pinned")}
    finally:
        device.close()


def load(case: Case) -> Iterator[Row]:
    """From a fresh process to its first answer."""
    seconds: dict[str, list[list[float]]] = {"fresh": [], "kept": []}
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(2 if case.quick else 6):
            for name, folder in (("fresh", f"{kept}/{turn}"), ("kept", f"{kept}/kept")):
                command = [sys.executable, "-c", FIRST_ANSWER, str(case.path), case.device]
                told = subprocess.run(  # noqa: S603 - this interpreter, on a file made here
                    command, env={**os.environ, "XDG_CACHE_HOME": folder}, capture_output=True, text=True, check=True
                )
                if turn:  # the first one fills the folder that is kept, and the disk's cache
                    seconds[name].append([float(number) for number in told.stdout.splitlines()[-1].split()])
    for name in ("fresh", "kept") if case.way == "tensorrt_rtx" else ("fresh",):
        loads, firsts = zip(*seconds[name], strict=True)
        yield {
            "kernels": name,
            "load_s": statistics.median(loads),
            "first_answer_s": statistics.median(firsts),
            "range_s": [min(map(sum, seconds[name])), max(map(sum, seconds[name]))],
        }


QUESTIONS: dict[str, Callable[[Case], Iterator[Row]]] = {
    function.__name__: function for function in (answers, contexts, graphs, arrays, load)
}


def _only(outputs: Mapping[str, Any]) -> Any:
    (output,) = outputs.values()
    return output


def _figures(table: LatencyTable, name: str) -> Row:
    baseline, row, control = table.row(table.baseline), table.row(name), table.row(table.control)
    return {
        f"{table.baseline}_us": baseline.median_us,
        f"{name}_us": row.median_us,
        "spread_us": [baseline.iqr_us, row.iqr_us],
        "ratio": row.ratio,
        "interval": [row.ratio_low, row.ratio_high],
        "control": [control.ratio_low, control.ratio_high],
        "disturbance": None if table.disturbance is None else table.disturbance.key,
    }


def why_not(way: str, question: str, *, quick: bool) -> str | None:
    """Why a question cannot be asked of a way here; None if it can."""
    if quick and (way != "onnxruntime" or question not in ("answers", "contexts", "load")):
        return "--quick is for the CPU"
    if importlib.util.find_spec(way) is None:
        return f"{way} is not installed"
    if way == "onnxruntime" and question == "graphs":
        return "the loader makes no graphs of ONNX Runtime's work"
    if way == "onnxruntime" and not quick:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        return None if "CUDAExecutionProvider" in providers else f"this ONNX Runtime has only {', '.join(providers)}"
    if question == "arrays" and not torch.cuda.is_available():
        return "this torch has no CUDA"
    return None


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.1e}"
    return str(value)


def main() -> None:
    """Ask what can be asked, and say of the rest why not."""
    parser = argparse.ArgumentParser(description="What only a GPU can show of the loader.")
    parser.add_argument("--quick", action="store_true", help="small networks in ONNX Runtime on the CPU")
    parser.add_argument("--only", choices=WAYS, help="one runtime alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    driver = probe()
    if driver.reason is not None and not arguments.quick:
        print(f"{driver.reason}: run this where a GPU is, or --quick on the CPU", file=sys.stderr)
        sys.exit(NO_GPU)
    facts = environment() | {"compute_capabilities": [gpu.compute_capability for gpu in driver.gpus]}
    print(facts)
    rows: list[Row] = []
    skipped: dict[tuple[str, str], str] = {}

    def ask(question: str, way: str, network: str, found: Iterator[Row]) -> None:
        try:
            for row in found:
                rows.append({"question": question, "way": way, "network": network, **row})
                print("  ".join(f"{name}={_cell(value)}" for name, value in rows[-1].items()), flush=True)
        except Exception as error:  # one that fails must not lose the others
            skipped[way, f"{network}, {question}"] = f"{type(error).__name__}: {error}"

    if not arguments.quick:
        ask("pinned", "driver", "none", pinned())
    for way in [arguments.only] if arguments.only else WAYS:
        reasons = {question: why_not(way, question, quick=arguments.quick) for question in QUESTIONS}
        skipped |= {(way, question): reason for question, reason in reasons.items() if reason is not None}
        asked = [question for question, reason in reasons.items() if reason is None]
        for network in networks(quick=arguments.quick) if asked else ():
            with tempfile.TemporaryDirectory() as made:
                try:
                    case = Case(network, way, *make(network, way, Path(made)), quick=arguments.quick)
                except Exception as error:
                    skipped[way, network.name] = f"{type(error).__name__}: {error}"
                    continue
                for question in asked:
                    ask(question, way, network.name, QUESTIONS[question](case))
    for (way, what), reason in skipped.items():
        print(f"skipped: {way}, {what}: {reason}")
    if arguments.json:
        report = {
            "environment": facts,
            "rows": rows,
            "skipped": [{"way": way, "what": what, "why": reason} for (way, what), reason in skipped.items()],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not rows:
        sys.exit("nothing could be asked")


if __name__ == "__main__":
    main()
