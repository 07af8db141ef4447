"""Check and measure sparse training products on a CUDA device, and train with them beside the masked ones.

1. Errors: packed products and gradients against the masked kernel, largest difference over largest value.
2. Speed: one optimizer step of one layer (what is made of its weight, forward, backward), all ways timed in turns, as
   multiples of a plain Linear's speed: medians, and quartiles of sparse.
   - emulated: masks in every pass; masked: the masked weight made once; sparse: packed once; auto: what `auto` takes;
   - product: the forward product alone; masks: share of a sparse step that goes into new masks every 40 steps.
3. Host memory that packing and multiplying leave behind.
4. Training: a small transformer reads the text of Python's standard library byte by byte, with masked and with sparse
   products from the same start, and with masked ones from another start, to show what difference is chance.

Usage: python scripts/gpu_training.py [--quick] [--search] [--json PATH]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.backend import Backend, format_table
from tnm_pipeline.training.kernels.prepare import masked_cast
from tnm_pipeline.training.kernels.support import library_note, why_never, why_not_now
from tnm_pipeline.training.kernels.trial import Trial
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.timing import Comparison, interleave

NO_GPU = 4
DEVICE = torch.device("cuda")
BOTH_WAYS, FORWARD_ONLY = Pattern(2, 4, transposable=True), Pattern(2, 4)
SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672))  # out and in features
TOKENS = 8192
MOST_ERROR = 1e-2
MASK_PERIOD = 40
Row = dict[str, Any]


def environment() -> Row:
    """The machine and library versions; export/environment.py has more, but imports more than this may need."""
    names = ("torch", "triton", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13")
    installed = {part.name: part.version for part in metadata.distributions()}
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "cusparselt_built_with": torch.backends.cusparselt.version(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in names if name in installed},
    }


def weight_and_mask(shape: tuple[int, int], pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Gaussian float32 weights and their mask."""
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    weight = torch.randn(shape, device=DEVICE, generator=generator) / shape[1] ** 0.5
    return weight, solve(weight, pattern)


def check(shape: tuple[int, int], tokens: int, pattern: Pattern, dtype: torch.dtype) -> Row:
    """The errors of one weight's products."""
    trial = Trial(*weight_and_mask(shape, pattern), tokens, dtype, 2 if pattern.transposable else 1)
    output, of_input, of_weight = trial.errors()
    case = {"weight": shape, "tokens": tokens, "pattern": str(pattern), "dtype": str(dtype).removeprefix("torch.")}
    return {**case, "output": output, "input_gradient": of_input, "weight_gradient": of_weight}


def measure(shape: tuple[int, int], tokens: int, rounds: int, *, search: bool) -> Row:
    """The speed of one weight's products in bfloat16."""
    dtype = torch.bfloat16
    weight, mask = weight_and_mask(shape, BOTH_WAYS)
    trial = Trial(weight, mask, tokens, dtype, 2)
    rows, cast = torch.randn(tokens, shape[1], device=DEVICE, dtype=dtype), masked_cast(weight, mask, dtype)
    packed = torch.ops.tnm_pipeline.pack_two_four(cast)
    times = interleave(
        {
            "dense": trial.dense,
            "emulated": trial.emulated,
            "masked": trial.masked,
            "prepare": trial.prepare,
            "sparse": trial.sparse,
            "pack": trial.pack,
            "dense product": lambda: F.linear(rows, cast),
            "product": lambda: torch.ops.tnm_pipeline.packed_product(rows, packed, None),
            "masks": lambda: solve(weight, BOTH_WAYS),
        },
        DEVICE,
        rounds,
    )
    wins = Comparison.of(times, 1).wins
    ms = {name: torch.tensor(values) for name, values in times.items()}
    step = {
        "emulated": ms["emulated"],
        "masked": ms["masked"] + ms["prepare"],
        "sparse": ms["sparse"] + ms["pack"],
    }
    step["auto"] = step["sparse" if wins else "masked"]
    row: Row = {"weight": shape, "tokens": tokens, "auto_takes": "sparse" if wins else "masked"}
    row |= {name: float((ms["dense"] / way).median()) for name, way in step.items()}
    quartiles = (ms["dense"] / step["sparse"]).quantile(torch.tensor([0.25, 0.75]))
    row |= {"sparse_quartiles": quartiles.tolist(), "product": float((ms["dense product"] / ms["product"]).median())}
    row |= {"masks": float((ms["masks"] / step["sparse"]).median()) / MASK_PERIOD}
    row |= {f"{name}_ms".replace(" ", "_"): float(values.median()) for name, values in ms.items()}
    return row | (_searched(rows, packed, rounds) if search else {})


def _searched(rows: Tensor, packed: Tensor, rounds: int) -> Row:
    """Whether cuSPARSELt knows a faster algorithm than its default, and whether that one is right."""
    algorithm = torch.ops.aten._cslt_sparse_mm_search(packed, rows.t(), transpose_result=True)

    def multiply(chosen: int) -> Tensor:
        found: Tensor = torch.ops.aten._cslt_sparse_mm(packed, rows.t(), transpose_result=True, alg_id=chosen)
        return found

    times = interleave({"default": lambda: multiply(0), "found": lambda: multiply(algorithm)}, DEVICE, rounds)
    faster = (torch.tensor(times["default"]) / torch.tensor(times["found"])).median()
    right = multiply(0).float()
    error = (multiply(algorithm) - right).abs().max() / right.abs().max()
    return {"algorithm": algorithm, "algorithm_faster": float(faster), "algorithm_error": float(error)}


def host_memory_left(steps: int) -> Row:
    """Bytes of host memory that one packing of W and W^T with three products leaves behind, after a warm-up."""
    weight, mask = weight_and_mask((64, 64), BOTH_WAYS)
    trial = Trial(weight, mask, 64, torch.bfloat16, 2)
    resident = []
    for _ in range(2):
        for _ in range(steps):
            trial.pack()
            trial.sparse()
        torch.cuda.synchronize()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    return {"steps": steps, "bytes_a_step": (resident[1] - resident[0]) / steps}


class Reader(nn.Module):
    """Predicts the next byte of a text: (batch, length) of bytes -> (batch, length, 256)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("later", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, text: Tensor) -> Tensor:
        """See the class."""
        states = self.blocks(self.bytes(text) + self.places.weight, mask=self.get_buffer("later"), is_causal=True)
        predicted: Tensor = self.head(states)
        return predicted


def standard_library() -> Tensor:
    """The modules of Python's standard library, in the order of their names, as bytes."""
    files = sorted(Path(platform.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def train(text: Tensor, backend: Backend, seed: int, steps: int, width: int) -> Row:
    """One run: its losses, what its layers multiplied with and how long its steps took."""
    torch.manual_seed(seed)
    length, batch = 256, 32
    model = Reader(width, length).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    sparsifier = Sparsifier(model, optimizer, BOTH_WAYS, "dynamic", total_steps=steps, backend=backend)
    draws = torch.Generator().manual_seed(seed)
    losses, ended = [], []
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch, 1), generator=draws)
        sample = text[starts + torch.arange(length + 1)].to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = model(sample[:, :-1])
        loss = F.cross_entropy(predicted.float().flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        ended.append(time.perf_counter())
    print(f"\n{backend}, seed {seed}: loss {losses[0]:.3f} -> {statistics.mean(losses[-20:]):.3f}")
    choices = sparsifier.packs.table()
    print(format_table(choices))
    reports, _ = sparsifier.finalize()
    return {
        "backend": backend,
        "seed": seed,
        "violations": sum((row.violations or 0) + (row.violations_transposed or 0) for row in reports),
        "sparse_layers": sum(choice.chosen == "sparse" for choice in choices),
        "layers": len(choices),
        "step_ms": statistics.median([after - before for before, after in pairwise(ended)]) * 1e3,
        "losses": [round(loss, 5) for loss in losses],
    }


def apart(one: Row, other: Row, window: int = 20) -> float:
    """Mean distance of two loss curves, each a mean over windows of steps."""
    curves = [torch.tensor(row["losses"]).unflatten(0, (-1, window)).mean(1) for row in (one, other)]
    return float((curves[0] - curves[1]).abs().mean())


def print_table(rows: list[Row], columns: tuple[str, ...]) -> None:
    """One line per row."""
    cells = [[name.replace("_", " ") for name in columns], *([_cell(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, tuple | list):
        return (" x " if isinstance(value, tuple) else "-").join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3f}"
    return str(value)


def main() -> None:
    """Check, measure, train, print."""
    parser = argparse.ArgumentParser(description="Check and measure sparse training products on a CUDA device.")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds and steps")
    parser.add_argument("--search", action="store_true", help="also let cuSPARSELt search for faster algorithms")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    reason = why_never(torch.zeros(16, 16), BOTH_WAYS) or why_not_now(torch.zeros(16, 16).to(DEVICE), torch.bfloat16)
    if reason:
        print(f"{reason}: this measures the sparse products of a GPU; run it where they are possible", file=sys.stderr)
        sys.exit(NO_GPU)
    shapes = ((512, 512), (1024, 512)) if arguments.quick else SHAPES
    rounds, steps, width = (5, 60, 256) if arguments.quick else (25, 600, 1024)

    facts = environment()
    print(facts, library_note(DEVICE).lstrip("; "), sep="\n")
    cases = [*product(((16, 16), (48, 80), (1024, 768)), (8, 129), (BOTH_WAYS, FORWARD_ONLY))]
    cases += [(shape, TOKENS, BOTH_WAYS) for shape in shapes]
    checked = [check(*case, dtype) for case in cases for dtype in (torch.bfloat16, torch.float16)]
    print_table(checked, tuple(checked[0]))
    parts = ("output", "input_gradient", "weight_gradient")
    wrong = [row[part] for row in checked for part in parts if not row[part] <= MOST_ERROR]
    if wrong:
        sys.exit(f"{len(wrong)} errors above {MOST_ERROR}, such as {wrong[0]}: the speed of wrong products is no speed")

    measured = [measure(shape, TOKENS, rounds, search=arguments.search) for shape in shapes]
    print("\nTimes as fast as a plain Linear, one optimizer step of one micro-batch")
    ways = ("emulated", "masked", "sparse", "auto")
    print_table(
        measured, ("weight", *ways, "sparse_quartiles", "auto_takes", "product", "masks", "pack_ms", "sparse_ms")
    )
    means = {way: statistics.geometric_mean([row[way] for row in measured]) for way in ways}
    print("geometric means:", ", ".join(f"{way} {mean:.3f}" for way, mean in means.items()))
    memory = host_memory_left(200 if arguments.quick else 2000)
    print(f"host memory left behind: {memory['bytes_a_step']:.0f} bytes a step")

    text = standard_library()
    masked = train(text, "masked", 0, steps, width)
    sparse, other = train(text, "sparse", 0, steps, width), train(text, "masked", 1, steps, width)
    distances = {"sparse_from_masked": apart(masked, sparse), "masked_from_another_start": apart(masked, other)}
    print("\ndistance of loss curves:", ", ".join(f"{name} {distance:.4f}" for name, distance in distances.items()))
    if arguments.json:
        report = {"environment": facts, "rows": measured, "geometric_means": means, "errors": checked}
        report |= {"host_memory": memory, "trainings": [masked, sparse, other], "distances": distances}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if any(run["violations"] for run in (masked, sparse, other)):
        sys.exit("a trained weight breaks its pattern")


if __name__ == "__main__":
    main()
