"""Print the tables of docs/theory.md: how many masks, what they keep, what greedy is sure to keep, what pruning breaks.

Usage: python scripts/theory.py [--weights COUNT] [--seed SEED]
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product

import torch

from tnm_pipeline.training.layout import to_blocks
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.masks.diversity import (
    CountTooLargeError,
    block_violation_probability,
    count_masks,
    estimate_log2_masks,
    paper_mask_diversity,
    violation_probability,
)
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.gaussian import (
    estimate_kept_magnitude,
    rowwise_kept_magnitude,
    unstructured_kept_magnitude,
)
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.masks.guarantee import greedy_guarantee, greedy_worst_block
from tnm_pipeline.training.pattern import Pattern

ROWWISE = [Pattern.parse(text) for text in ("2:4", "4:8", "8:16", "16:32")]
TRANSPOSABLE = [Pattern(pattern.n, pattern.m, transposable=True) for pattern in ROWWISE]
LURES = [Pattern.parse(text) for text in ("1:4-T", "2:4-T", "3:4-T", "4:8-T", "6:8-T")]
EPSILON = 1e-3
_SHORTFALL_BLOCKS = 20_000


def diversity() -> Iterator[Sequence[str]]:
    """Masks per block: exact where they can be counted, else the estimate; bits per weight; the paper's formula."""
    yield "pattern", "masks of an M x M block", "bits per weight", "estimate / exact", "paper's formula"
    for pattern in (*ROWWISE, *TRANSPOSABLE):
        paper = _count(math.log2(paper_mask_diversity(pattern)))
        bits = estimate_log2_masks(pattern)
        try:
            exact = math.log2(count_masks(pattern))
        except CountTooLargeError:
            yield str(pattern), f"about {_count(bits)}", f"{bits / pattern.m**2:.3f}", "not counted", paper
            continue
        ratio = f"{2 ** (bits - exact):.3f}" if pattern.transposable else "exact"
        yield str(pattern), _count(exact), f"{exact / pattern.m**2:.3f}", ratio, paper


def kept_magnitudes(weights: int, seed: int) -> Iterator[Sequence[str]]:
    """Of Gaussian weights, half of them kept."""
    yield "pattern", "kept magnitude", "how", "greedy"
    yield "unstructured 50%", f"{unstructured_kept_magnitude(0.5):.4f}", "closed form", ""
    for pattern in ROWWISE:
        yield str(pattern), f"{rowwise_kept_magnitude(pattern):.4f}", "integral", ""
    for pattern in TRANSPOSABLE:
        blocks = weights // pattern.m**2
        exact = estimate_kept_magnitude(pattern, blocks=blocks, seed=seed)
        greedy = estimate_kept_magnitude(pattern, blocks=blocks, seed=seed, solver="greedy")
        yield (
            str(pattern),
            f"{exact.value:.4f} ± {exact.standard_error:.4f}",
            f"{blocks:,} blocks",
            f"{greedy.value:.4f}",
        )


def shortfalls(seed: int) -> Iterator[Sequence[str]]:
    """What 2:4-T loses by keeping exactly two: every mask with at most two in a row and column, on Gaussian blocks."""
    yield "blocks", "better with fewer", "mean gain", "largest gain"
    rows = [[float(j in kept) for j in range(4)] for size in range(3) for kept in combinations(range(4), size)]
    masks = torch.tensor(list(product(rows, repeat=4)))
    at_most = masks[(masks.sum(1) <= 2).all(1)].reshape(-1, 16)
    weights = torch.randn(_SHORTFALL_BLOCKS * 4, 4, generator=torch.Generator().manual_seed(seed)).abs()
    kept = to_blocks(weights * solve(weights, TRANSPOSABLE[0]), 4).sum((1, 2))
    chunks = torch.split(to_blocks(weights, 4).reshape(-1, 16), 1000)
    gain = torch.cat([(chunk @ at_most.T).amax(1) for chunk in chunks]) / kept - 1
    better = (gain > 1e-6).double().mean()  # float32 sums in another order
    yield f"{_SHORTFALL_BLOCKS:,}", f"{float(better):.1%}", f"{float(gain.mean()):.3%}", f"{float(gain.max()):.1%}"


def guarantees() -> Iterator[Sequence[str]]:
    """The block that lures greedy, against min-cost flow."""
    yield "pattern", "greedy keeps", "the optimum", "ratio", "guarantee"
    for pattern in LURES:
        block = greedy_worst_block(pattern, EPSILON)[None]
        greedy = float((block * solve_greedy(block, pattern.n)).sum())
        best = float((block * solve_flow(block, pattern.n)).sum())
        yield str(pattern), f"{greedy:.3f}", f"{best:.3f}", f"{greedy / best:.5f}", f"{greedy_guarantee(pattern):.2f}"


def violations() -> Iterator[Sequence[str]]:
    """Of weights that are zero at random."""
    yield "pattern", "zeros", "a group breaks it", "an M x M block breaks it"
    for pattern in (ROWWISE[0], TRANSPOSABLE[0], ROWWISE[1], TRANSPOSABLE[1]):
        for sparsity in (0.5, 0.7, 0.9):
            group = f"{violation_probability(pattern, sparsity):.4f}"
            yield str(pattern), f"{sparsity:.0%}", group, f"{block_violation_probability(pattern, sparsity):.4f}"


def _count(bits: float) -> str:
    """2^bits, written out while that is short."""
    return f"{2**bits:,.0f}" if bits < 40 else f"2^{bits:.2f}"


def _print(title: str, rows: Iterator[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print("|---" * len(row) + "|")


def main() -> None:
    """Print all tables, as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--weights", type=int, default=4_000_000, help="Gaussian weights drawn per transposable pattern"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    _print("Exactly N or at most N, 2:4-T", shortfalls(options.seed))
    _print("Masks", diversity())
    _print("Kept magnitude of Gaussian weights", kept_magnitudes(options.weights, options.seed))
    _print(f"Greedy on its worst block, epsilon {EPSILON}", guarantees())
    _print("Violations of a weight that is zero at random", violations())


if __name__ == "__main__":
    main()
