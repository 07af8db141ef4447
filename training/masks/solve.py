"""The one entry to the mask solvers: a weight and a pattern in, a mask out."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from tnm_pipeline.training.layout import from_blocks, from_gemm, pad_to_multiple, to_blocks, to_gemm
from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.masks.exact.cuda import solve_on_cuda
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.pattern import Pattern

Solver = Literal["exact", "greedy", "flow"]

_BLOCKS_AT_ONCE = 1 << 17  # bounds the scratch memory of greedy and flow to some tens of megabytes
_SHORT_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # solved in their own format


@torch.no_grad()
def solve(weight: Tensor, pattern: Pattern, solver: Solver = "exact", importance: Tensor | None = None) -> Tensor:
    """Choose which weights to keep so that the pattern holds and the kept magnitude is largest.

    `exact` keeps exactly N in every full row (and, for a transposable pattern, column) of a block,
    which is what hardware uses fully; allowing fewer than N could keep 0.05% more on average. Where M
    does not divide a side, the GEMM matrix ends in zeros that are cropped from the mask: edge groups then
    hold at most N.

    A registered torch operator (`tnm_pipeline::solve_mask`): it may be called under `torch.compile`.

    Args:
        weight: (O, I) or (O, I, H, W), any real floating dtype, strides and device, finite. Its absolute value
            is what counts; float64 is rounded to float32.
        pattern: the rule, any N:M up to M = 32.
        solver: `exact`: optimal, and the fastest. `greedy`: the paper's 2-approximation, which may keep fewer than N.
            `flow`: networkx min-cost flow, the reference, about 30,000 weights a second. Row-wise patterns have one
            solver, whatever is asked.
        importance: what to keep the most of in place of abs(weight): same shape, not negative, finite. For example
            abs(weight) times the norm of the layer's inputs.

    Returns:
        Bool tensor of the weight's shape, `True` = kept, contiguous, on the weight's device. The same for any number
        of threads.

    Raises:
        ValueError: NaN, Inf or a float64 beyond float32's range (with its place), a negative importance or one of
            another shape, an unknown solver, or a weight that has no GEMM form.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(get_args(Solver))}")
    scores = weight if importance is None else _checked(importance, weight)
    operator = torch.ops.tnm_pipeline.solve_mask
    mask: Tensor = operator(scores.detach(), pattern.n, pattern.m, pattern.transposable, solver)
    return mask


def _checked(importance: Tensor, weight: Tensor) -> Tensor:
    if importance.shape != weight.shape:
        raise ValueError(f"importance has shape {tuple(importance.shape)}, the weight {tuple(weight.shape)}")
    if bool((importance < 0).any()):
        raise ValueError("importance has negative entries: larger means rather kept, so it starts at 0; pass its abs()")
    return importance


# Not `torch.library.custom_op`: its first call imports the compiler, two seconds for everybody who does not compile.
_library = torch.library.Library("tnm_pipeline", "DEF")
_library.define("solve_mask(Tensor scores, int n, int m, bool transposable, str solver) -> Tensor")


@torch.library.impl(_library, "solve_mask", "CompositeExplicitAutograd")
def _solve_mask(scores: Tensor, n: int, m: int, transposable: bool, solver: str) -> Tensor:
    """The operator behind `solve`, whose arguments it takes apart."""
    pattern = Pattern(n, m, transposable)
    matrix = to_gemm(scores)
    if matrix.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if matrix.dtype not in _SHORT_FLOATS:
        matrix = matrix.float()
    if solver == "exact" or not transposable:
        mask, finite = _exact(matrix, pattern)
    else:
        finite = bool(torch.isfinite(matrix).all())
        mask = _by_blocks(solve_greedy if solver == "greedy" else solve_flow, matrix, pattern) if finite else matrix
    if not finite:
        raise ValueError(_where_not_finite(scores))
    return from_gemm(mask, scores.shape)


def _fake_mask(scores: Tensor, n: int, m: int, transposable: bool, solver: str) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


torch.library.register_fake("tnm_pipeline::solve_mask", _fake_mask, lib=_library)


def _exact(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    """The mask of a matrix on any device, and whether all of the matrix was finite."""
    if matrix.is_cuda:
        return solve_on_cuda(matrix, pattern)
    mask, finite = solve_on_cpu(matrix.cpu(), pattern)
    return mask.to(matrix.device), finite


def _by_blocks(solve_blocks: Callable[[Tensor, int], Tensor], matrix: Tensor, pattern: Pattern) -> Tensor:
    """Apply a solver of blocks to a matrix, in chunks, so that scratch memory does not grow with the layer."""
    padded = pad_to_multiple(matrix.abs(), pattern.m)
    chunks = torch.split(to_blocks(padded, pattern.m), _BLOCKS_AT_ONCE)
    kept = torch.cat([solve_blocks(chunk, pattern.n) for chunk in chunks])
    return from_blocks(kept, *padded.shape)[: matrix.shape[0], : matrix.shape[1]]


def _where_not_finite(scores: Tensor) -> str:
    kind, way = "NaN or Inf entries", "no mask is best for it; repair the checkpoint or the importance first"
    places = (~torch.isfinite(scores)).nonzero()
    if not len(places):
        kind, way = "entries beyond float32", "divide all of it by its largest magnitude, which changes no mask"
        places = (~torch.isfinite(scores.float())).nonzero()
    return (
        f"the weight, or the importance given in its place, has {kind} ({len(places)} of {scores.numel()}, the first "
        f"at {places[0].tolist()}): {way}"
    )
