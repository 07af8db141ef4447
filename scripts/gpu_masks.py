"""Measure the mask solvers on a CUDA device, each beside the memory's limit, and compare every mask with the CPU's.

The limit is a kernel that reads every weight and writes a byte for it (torch.gt), timed in turns with the solver.
Gaussian weights; columns, in 10^9 weights a second where not said:

- kernel: the solver's kernel alone, with the lowest and highest repeat; copy: the limit; of copy: their ratio;
- call: from a weight on the device to its mask there, with the wait for the device and the blocks left to the CPU;
- unproven: share of blocks that the kernel leaves to the CPU;
- kept equal, masks equal: whether the mask keeps the magnitude of the CPU's mask, and whether it is the same mask.

Usage: python scripts/gpu_masks.py [--quick] [--json PATH]
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.masks.exact.cuda import solve_on_cuda
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T", "2:4", "4:8")
DTYPES = (torch.float32, torch.bfloat16)
BATCH_SECONDS = 0.02  # what is launched between two events takes about this long: launches then overlap
NO_GPU = 4
Row = dict[str, object]


def kernel_of(pattern: Pattern) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What the call launches first; returns a mask and, of a swept pattern, which blocks are proven."""
    from tnm_pipeline.training.masks.exact.cuda_rowwise import solve_rows  # these need Triton: looked for by `main`
    from tnm_pipeline.training.masks.exact.cuda_transposable import prove_blocks
    from tnm_pipeline.training.masks.exact.cuda_two_four import solve_two_four

    if not pattern.transposable:
        return lambda matrix: solve_rows(matrix, pattern.n, pattern.m)
    if (pattern.n, pattern.m) == (2, 4):
        return solve_two_four
    return lambda matrix: prove_blocks(matrix, pattern.n, pattern.m)


def seconds(function: Callable[[], object], launches: int) -> float:
    """Of one launch, by CUDA events around several."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(launches):
        function()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / launches


def launches_for(function: Callable[[], object]) -> int:
    """How many launches fill a batch; also compiles and warms up."""
    function()
    return max(1, min(1000, round(BATCH_SECONDS / seconds(function, 3))))


def bench(text: str, size: int, dtype: torch.dtype, repeats: int) -> Row:
    """One pattern on one square matrix."""
    pattern = Pattern.parse(text)
    generator = torch.Generator("cuda").manual_seed(size)
    weight = torch.randn(size, size, device="cuda", generator=generator).to(dtype)
    copied = torch.empty(size, size, dtype=torch.bool, device="cuda")
    kernel = kernel_of(pattern)
    functions: dict[str, Callable[[], object]] = {
        "kernel": lambda: kernel(weight),
        "copy": lambda: torch.gt(weight, 0, out=copied),
        "call": lambda: solve_on_cuda(weight, pattern),
    }
    launches = {name: launches_for(function) for name, function in functions.items()}
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            rates[name].append(weight.numel() / seconds(function, launches[name]) / 1e9)

    swept = pattern.transposable and (pattern.n, pattern.m) != (2, 4)
    mask = solve_on_cuda(weight, pattern)[0].cpu()
    expected = solve_on_cpu(weight.cpu(), pattern)[0]
    magnitude = weight.cpu().abs().double()
    return {
        "pattern": text,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": statistics.median(rates["kernel"]),
        "kernel_spread": [min(rates["kernel"]), max(rates["kernel"])],
        "copy": statistics.median(rates["copy"]),
        "of_copy": statistics.median(rates["kernel"]) / statistics.median(rates["copy"]),
        "call": statistics.median(rates["call"]),
        "call_spread": [min(rates["call"]), max(rates["call"])],
        "unproven": 1 - float(kernel(weight)[1].float().mean()) if swept else 0.0,
        "kept_equal": float((magnitude * mask).sum()) == float((magnitude * expected).sum()),
        "masks_equal": torch.equal(mask, expected),
    }


def environment() -> Row:
    """The machine and library versions; export/environment.py has more, but imports more than this may need."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "triton", "numba", "numpy")},
    }


def print_table(rows: list[Row]) -> None:
    """One line per row."""
    cells = [[name.replace("_", " ") for name in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.4f}" if value < 1 else f"{value:.1f}"
    return str(value)


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description="Measure the mask solvers on a CUDA device.")
    parser.add_argument("--quick", action="store_true", help="one small size, three repeats")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "no CUDA device: this measures the GPU's kernels; run it where torch.cuda.is_available()", file=sys.stderr
        )
        sys.exit(NO_GPU)
    sizes, repeats = ((1024,), 3) if arguments.quick else ((2048, 8192), 15)

    facts = environment()
    print(facts)
    rows = [bench(text, size, dtype, repeats) for text in PATTERNS for size in sizes for dtype in DTYPES]
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")
    if not all(row["masks_equal"] for row in rows):
        sys.exit("a mask differs from the CPU's")


if __name__ == "__main__":
    main()
