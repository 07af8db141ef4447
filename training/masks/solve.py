"""The one entry to the mask solvers: a weight and a pattern in, a mask out."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from tnm_pipeline.training.layout import from_blocks, from_gemm, pad_to_multiple, to_blocks, to_gemm
from tnm_pipeline.training.masks.exact import solve_2_4
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.masks.rowwise import solve_rowwise
from tnm_pipeline.training.pattern import Pattern

Solver = Literal["exact", "greedy", "flow"]

_BLOCKS_AT_ONCE = 1 << 17  # bounds the solvers' scratch memory to some tens of megabytes


@torch.no_grad()
def solve(weight: Tensor, pattern: Pattern, solver: Solver = "exact") -> Tensor:
    """Choose which weights to keep so that the pattern holds and the kept magnitude is largest.

    `exact` keeps exactly N in every full row (and, for a transposable pattern, column) of a block,
    which is what hardware uses fully; allowing fewer than N could keep 0.05% more on average. Where M
    does not divide a side, the GEMM matrix is padded with zeros and the mask cropped: edge groups then
    hold at most N.

    Args:
        weight: (O, I) or (O, I, H, W), any real floating dtype and strides, finite. Its absolute value
            is what counts.
        pattern: the rule.
        solver: `exact`: optimal; 2:4-T in tensor ops, row-wise patterns by sorting, other transposable
            ones by min-cost flow (slow: about 27,000 weights a second). `greedy`: the paper's
            2-approximation. `flow`: networkx min-cost flow, the reference. Row-wise patterns have one
            solver, whatever is asked.

    Returns:
        Bool tensor of the weight's shape, `True` = kept, on the weight's device.

    Raises:
        ValueError: NaN or Inf in the weight, an unknown solver, or a weight that has no GEMM form.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(get_args(Solver))}")
    matrix = to_gemm(weight.detach()).abs()
    if matrix.numel() == 0:
        return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the weight has NaN or Inf entries: no mask is best for it; repair the checkpoint first")
    padded = pad_to_multiple(matrix, pattern.m)
    if pattern.transposable:
        blocks = to_blocks(padded, pattern.m)
        kept = _in_chunks(_transposable_solver(pattern, solver), blocks)
        mask = from_blocks(kept, *padded.shape)
    else:
        groups = padded.reshape(-1, pattern.m)
        mask = _in_chunks(lambda part: solve_rowwise(part, pattern.n), groups).reshape(padded.shape)
    return from_gemm(mask[: matrix.shape[0], : matrix.shape[1]], weight.shape)


def _transposable_solver(pattern: Pattern, solver: Solver) -> Callable[[Tensor], Tensor]:
    if solver == "greedy":
        return lambda blocks: solve_greedy(blocks, pattern.n)
    if solver == "exact" and (pattern.n, pattern.m) == (2, 4):
        return solve_2_4
    return lambda blocks: solve_flow(blocks, pattern.n)


def _in_chunks(solve_part: Callable[[Tensor], Tensor], parts: Tensor) -> Tensor:
    """Apply a solver to slices along the first axis, so that scratch memory does not grow with the layer."""
    return torch.cat([solve_part(part) for part in torch.split(parts, _BLOCKS_AT_ONCE)])
