"""CUDA tensors in, masks out: the masks of `cpu.py` bit for bit, by Triton kernels where they can prove them.

What they leave, blocks whose weights tie or are not finite, goes to the CPU's solver. Without Triton everything does.

Shape legend: O = out features, K = reduction length of the GEMM matrix, U = blocks left, M = group size.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from tnm_pipeline.training.layout import from_blocks, pad_to_multiple, to_blocks
from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.masks.exact.tile import LANES
from tnm_pipeline.training.pattern import Pattern

_log = logging.getLogger(__name__)


def solve_on_cuda(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    """The exact mask of a GEMM matrix, by abs(matrix): the same as `solve_on_cpu` finds.

    Args:
        matrix: (O, K), float32, float16 or bfloat16, on a CUDA device, any strides; read in place.
        pattern: the rule, any N:M.

    Returns:
        (O, K) bool, contiguous, on the matrix's device; and whether every entry was finite, without which the mask
        means nothing. Waits for the device to know.
    """
    if not _has_triton():
        return _solve_on_host(matrix, pattern)
    with torch.cuda.device(matrix.device):  # where Triton launches, on the current stream
        return solve_by_kernels(matrix, pattern)


def solve_by_kernels(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    """`solve_on_cuda` on the current device; also on CPU tensors, under Triton's interpreter."""
    # Triton may be missing: these files cannot be imported without it.
    from tnm_pipeline.training.masks.exact.cuda_rowwise import solve_rows
    from tnm_pipeline.training.masks.exact.cuda_transposable import prove_blocks
    from tnm_pipeline.training.masks.exact.cuda_two_four import solve_two_four

    rows, columns = matrix.shape
    if not pattern.transposable:
        mask, all_finite = solve_rows(matrix, pattern.n, pattern.m)
        return mask, bool(all_finite)
    if (pattern.n, pattern.m) == (2, 4):
        mask, holds = solve_two_four(matrix)
        if not holds:  # the CPU then takes its other solver for the whole matrix
            return _solve_on_host(matrix, pattern)
        return mask[:rows, :columns].contiguous(), True
    mask, proven = prove_blocks(matrix, pattern.n, pattern.m)
    places = (~proven).nonzero()
    finite = len(places) == 0 or _solve_left(matrix, pattern, places, mask)
    return mask[:rows, :columns].contiguous(), finite


def _solve_left(matrix: Tensor, pattern: Pattern, places: Tensor, mask: Tensor) -> bool:
    """Solve some blocks on the CPU, and write them into the mask.

    Args:
        matrix: (O, K).
        pattern: the rule.
        places: (U, 2), the block row and block column of each.
        mask: (ceil(O/M)*M, ceil(K/M)*M) bool.

    Returns:
        Whether their entries are finite. As a block that is not never is proven, this tells it of the matrix.
    """
    m = pattern.m
    strip, group = places.unbind(1)
    blocks = _blocks_of(pad_to_multiple(matrix, m), m)[strip, group]
    strips = -(-len(blocks) // LANES)  # full tiles: the solver's lanes side by side, its threads share the strips
    blocks = F.pad(blocks, (0, 0, 0, 0, 0, strips * LANES - len(blocks)))
    solved, finite = solve_on_cpu(from_blocks(blocks, strips * m, LANES * m).cpu(), pattern)
    _blocks_of(mask, m)[strip, group] = to_blocks(solved, m)[: len(places)].to(mask.device)
    return finite


def _blocks_of(matrix: Tensor, m: int) -> Tensor:
    """The blocks of a matrix as a view: (O/M, K/M, M, M)."""
    blocks: Tensor = matrix.unflatten(0, (-1, m)).unflatten(2, (-1, m)).transpose(1, 2)
    return blocks


def _solve_on_host(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    mask, finite = solve_on_cpu(matrix.cpu(), pattern)
    return mask.to(matrix.device), finite


@cache
def _has_triton() -> bool:
    """Whether Triton is installed; says so once where it is not."""
    found = find_spec("triton") is not None
    if not found:
        _log.warning("masks of CUDA tensors are solved on the CPU, which is slower: install triton for the GPU kernels")
    return found
