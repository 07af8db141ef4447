"""A weight of an ONNX node as (B, O, K), and its groups counted. No line is shared with the solvers.

B = kernel positions of a convolution, or matrices of a batched MatMul; O = out features; K = in features, the axis
along which TensorRT reads groups. One count fits all.
"""

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tnm_pipeline.training.pattern import Pattern

TENSORRT_PATTERN = Pattern(2, 4)
WEIGHTED_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_CONVOLUTIONS = ("Conv", "ConvTranspose")

Mask = NDArray[np.bool_]


def view_of(node: ir.Node, kept: Mask, *, left: bool) -> Mask:
    """Arrange what is not zero in a weight.

    Args:
        node: One of `WEIGHTED_OPS`.
        kept: Of the weight's shape.
        left: The weight is the left operand of the product.

    Returns:
        Shape (B, O, K), where it can without a copy.

    Raises:
        ValueError: The weight has a rank, or a number of channels, that the operator cannot take.
    """
    operator, rank = node.op_type, kept.ndim
    if rank < 1 or (operator == "Gemm" and rank != 2) or (operator in _CONVOLUTIONS and rank < 3):
        raise ValueError(f"a weight of shape {kept.shape}, which {operator} does not take")
    if operator == "Conv":  # (O, I, *kernel)
        return np.moveaxis(kept.reshape(*kept.shape[:2], math.prod(kept.shape[2:])), 2, 0)
    if operator == "ConvTranspose":
        return _transposed_convolution(kept, group_count(node))
    if rank == 1:  # MatMul takes a vector for a matrix with one row or column
        return kept.reshape(1, 1, kept.size)
    turned = node.attributes.get_int("transA" if left else "transB", 0) == 1 if operator == "Gemm" else False
    rows = kept if left != turned else kept.swapaxes(-2, -1)  # (..., O, K)
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])


def _transposed_convolution(kept: Mask, groups: int) -> Mask:
    """(I, O of a group, *kernel), where the groups of a grouped one follow each other along I."""
    if kept.shape[0] % groups:
        raise ValueError(f"{kept.shape[0]} input channels in {groups} groups")
    parts = kept.reshape(groups, kept.shape[0] // groups, kept.shape[1], math.prod(kept.shape[2:]))
    view = parts.transpose(3, 0, 2, 1)  # (kernel, group, O of a group, I of a group)
    return view.reshape(view.shape[0], groups * view.shape[2], view.shape[3])


def group_count(node: ir.Node) -> int:
    """The `group` of a convolution."""
    count = node.attributes.get_int("group", 1)
    if count < 1:
        raise ValueError(f"a convolution in {count} groups")
    return count


def gemm_shape(node: ir.Node, view: Mask) -> tuple[int, int]:
    """(O, K) of the GEMM matrix; K = in channels x kernel positions for a convolution."""
    positions, out_features, in_features = view.shape
    return out_features, in_features * (positions if node.op_type in _CONVOLUTIONS else 1)


def violations(view: Mask, pattern: Pattern) -> int:
    """Groups of M along the last axis with more than N non-zeros; a short last group counts as a group."""
    counts = view[..., :: pattern.m].astype(np.uint8)
    for offset in range(1, min(pattern.m, view.shape[-1])):
        part = view[..., offset :: pattern.m]
        counts[..., : part.shape[-1]] += part
    return int(np.count_nonzero(counts > pattern.n))


def why_not(node: ir.Node, view: Mask, pattern: Pattern | None, *, rank: int, left: bool, broken: int) -> str:
    """Why TensorRT cannot take a weight for sparse; empty if it can.

    Args:
        node: One of `WEIGHTED_OPS`.
        view: Of `view_of`.
        pattern: What the weight was made for, if anybody knows.
        rank: The weight's.
        left: The weight is the left operand of the product.
        broken: Violations of `TENSORRT_PATTERN`.
    """
    in_features = view.shape[2]
    if node.op_type == "ConvTranspose":
        return f"transposed convolution: NVIDIA documents {TENSORRT_PATTERN} for Conv, Gemm and MatMul"
    if left:
        return "the weight is the left operand of the product"
    if rank == 1:
        return "the weight is a vector"
    if node.op_type == "Conv":
        if group_count(node) > 1:
            return f"grouped convolution ({group_count(node)} groups)"
        if in_features % TENSORRT_PATTERN.m:
            return f"{in_features} input channels are not a multiple of {TENSORRT_PATTERN.m}"
    if in_features % TENSORRT_PATTERN.m or not in_features:
        return f"K = {in_features} is not a multiple of {TENSORRT_PATTERN.m}"
    if not broken:
        return ""
    if pattern is not None and (pattern.n, pattern.m) != (TENSORRT_PATTERN.n, TENSORRT_PATTERN.m):
        return f"pattern {pattern}: TensorRT accelerates {TENSORRT_PATTERN} only"
    return f"breaks {TENSORRT_PATTERN} in {broken} groups"
