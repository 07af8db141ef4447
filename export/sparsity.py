"""N:M of every weight in an ONNX file, along the axis that TensorRT reads. No line is shared with the solvers.

Every weight is viewed as (B, O, K) so that one count fits all. B = kernel positions of a convolution, or
matrices of a batched MatMul; O = out features; K = in features, the axis along which TensorRT reads groups.
"""

import ast
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import inliner

from tnm_pipeline.export.artifacts import NAME_SCOPES, read_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.weights import constant_of
from tnm_pipeline.training.pattern import Pattern

TENSORRT_PATTERN = Pattern(2, 4)
_WEIGHTED_OPS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class LayerSparsity:
    """One weight of one node, counted.

    Attributes:
        name: The torch layer (`"layer1.conv"`, no `.weight`); in a foreign file the initializer or the node.
        node: The ONNX node.
        op: `"MatMul"`, `"Gemm"` or `"Conv"`.
        shape: The weight as the node sees it.
        gemm_shape: (O, K) of the GEMM matrix; K = in channels x kernel positions for a convolution.
        pattern: The rule it was counted against in text form; None where none was asked for, and then the
            counts are against 2:4.
        density: Fraction of non-zero weights.
        groups: Groups of M along K, a short one at the edge included.
        violations: Those with more than N non-zeros.
        violations_transposed: Groups of M along O, of the transposed matrix, with more than N non-zeros.
        eligible: The weight is 2:4 along K in whole groups, so TensorRT may pick a sparse tactic for it.
        why: Why it is not eligible; empty if it is.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    gemm_shape: tuple[int, int]
    pattern: str | None
    density: float
    groups: int
    violations: int
    violations_transposed: int
    eligible: bool
    why: str

    @property
    def holds(self) -> bool:
        """Whether the weight keeps its pattern: along K, and for a transposable one along O too."""
        if self.pattern is None:
            return True
        transposable = Pattern.parse(self.pattern).transposable
        return not self.violations and not (transposable and self.violations_transposed)


@dataclass(frozen=True)
class SparsityReport:
    """Every weight of an ONNX file.

    Attributes:
        layers: In graph order; a weight used by two nodes appears twice.
        missing: Layers that were asked about by name and that no node uses, sorted.
    """

    layers: tuple[LayerSparsity, ...]
    missing: tuple[str, ...]

    @property
    def violations(self) -> int:
        """Groups along K that break the pattern, over the layers that have one."""
        return sum(layer.violations for layer in self.layers if layer.pattern is not None)

    @property
    def violations_transposed(self) -> int:
        """Groups along O that break the pattern, over the layers whose pattern is transposable."""
        transposable = [layer for layer in self.layers if layer.pattern and Pattern.parse(layer.pattern).transposable]
        return sum(layer.violations_transposed for layer in transposable)

    def to_dict(self) -> dict[str, object]:
        """Everything, as JSON-able data."""
        layers = [asdict(layer) for layer in self.layers]
        return {**self.summary(), "missing": list(self.missing), "per_layer": layers}

    def summary(self) -> dict[str, object]:
        """What goes into a manifest: totals, and the pattern of every layer that was asked for one."""
        return {
            "layers": len(self.layers),
            "eligible": sum(layer.eligible for layer in self.layers),
            "violations": self.violations,
            "violations_transposed": self.violations_transposed,
            "patterns": {layer.name: layer.pattern for layer in self.layers if layer.pattern is not None},
        }


def inspect_onnx(
    path: Path, patterns: Mapping[str, Pattern] | None = None, default: Pattern | None = None
) -> SparsityReport:
    """Count N:M violations in the weight of every MatMul, Gemm and Conv, in O(weights).

    Args:
        path: An ONNX file of any origin; fp32, fp16, bf16 and quantised weights, also behind Transpose, Cast,
            Identity and DequantizeLinear nodes.
        patterns: Torch layer name -> the pattern it should hold.
        default: The pattern of every layer that `patterns` does not name; None asks for none.

    Returns:
        The report. Weights that are computed at run time are activations, and not in it.

    Raises:
        ExportRejected: The file is missing or malformed.
    """
    patterns = {} if patterns is None else patterns
    proto = read_onnx(path)
    try:
        model = ir.from_proto(inliner.inline_local_functions(proto))
        layers = tuple(_layers(model, patterns, default))
    # Data that contradicts its shape, and metadata that is not what torch writes.
    except (ValueError, TypeError, IndexError, SyntaxError, ir.serde.SerdeError) as error:
        raise ExportRejected(
            f"{path} holds a weight that cannot be read: {error}. Write it again with `tnm-pipeline export`"
        ) from error
    return SparsityReport(layers, tuple(sorted(set(patterns) - {layer.name for layer in layers})))


def _layers(model: ir.Model, patterns: Mapping[str, Pattern], default: Pattern | None) -> Iterator[LayerSparsity]:
    seen: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in _WEIGHTED_OPS or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
            continue
        weight = constant_of(node.inputs[1])
        left = weight is None and node.op_type != "Conv"
        if left:
            weight = constant_of(node.inputs[0])
        if weight is None or weight.values.ndim < 2:
            continue
        name = _name(node, weight.name, asked=set(patterns) - seen)
        seen.add(name)
        yield _count(node, name, weight.values, patterns.get(name, default), left=left)


def _name(node: ir.Node, initializer: str | None, asked: Set[str]) -> str:
    """What torch called this layer: by its parameter, or by the module that ran it if only that is asked about.

    The exporter keeps one initializer for tied weights and for weights that happen to be equal, under the name of
    one of them.
    """
    scopes = [scope for scope in ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))[:-1] if scope]
    parameter = initializer or ""
    # val_N is what torch's exporter calls a constant that has no parameter.
    nameless = not parameter or parameter.removeprefix("val_").isdigit()
    names = [] if nameless else [parameter.removesuffix(".weight")]
    names += [*scopes[-1:], parameter or node.name or f"{node.op_type} without a name"]
    return next((name for name in names if name in asked), names[0])


def _count(
    node: ir.Node, name: str, weight: NDArray[np.generic], pattern: Pattern | None, *, left: bool
) -> LayerSparsity:
    view = _left_view(node, weight != 0) if left else _gemm_view(node, weight != 0)
    positions, out_features, in_features = view.shape
    rule = TENSORRT_PATTERN if pattern is None else pattern
    why = "the weight is the left operand of the product" if left else _why_not(node, view, pattern)
    return LayerSparsity(
        name=name,
        node=node.name or "",
        op=node.op_type,
        shape=weight.shape,
        gemm_shape=(out_features, in_features * (positions if node.op_type == "Conv" else 1)),
        pattern=None if pattern is None else str(pattern),
        density=float(view.mean()) if view.size else 0.0,
        groups=positions * out_features * -(-in_features // rule.m),
        violations=_violations(view, rule),
        violations_transposed=_violations(view.swapaxes(1, 2), rule),
        eligible=not why,
        why=why,
    )


def _gemm_view(node: ir.Node, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A weight's non-zeros as (B, O, K)."""
    if node.op_type == "Conv":  # (O, I, *kernel)
        positions = kept.reshape(*kept.shape[:2], -1)
        return np.moveaxis(positions, 2, 0)
    if node.op_type == "MatMul":  # (..., K, O)
        return kept.reshape(-1, *kept.shape[-2:]).swapaxes(1, 2)
    transposed = node.attributes.get_int("transB", 0)
    return (kept if transposed else kept.T)[np.newaxis]


def _left_view(node: ir.Node, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A left operand's non-zeros as (B, O, K): the reduction runs over its last axis, unless transA."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1
    rows = kept.swapaxes(-2, -1) if transposed else kept
    return rows.reshape(-1, *rows.shape[-2:])


def _violations(view: NDArray[np.bool_], pattern: Pattern) -> int:
    """Groups of M along the last axis with more than N non-zeros; a short last group counts as a group."""
    length = view.shape[-1]
    padding = -length % pattern.m
    padded = np.pad(view, ((0, 0), (0, 0), (0, padding))) if padding else np.ascontiguousarray(view)
    groups = padded.reshape(-1, pattern.m)
    return int(np.count_nonzero(groups.sum(axis=1, dtype=np.uint8) > pattern.n))


def _why_not(node: ir.Node, view: NDArray[np.bool_], pattern: Pattern | None) -> str:
    in_features = view.shape[2]
    if node.op_type == "Conv":
        convolution_groups = node.attributes.get_int("group", 1)
        if convolution_groups > 1:
            return f"grouped convolution ({convolution_groups} groups)"
        if in_features % TENSORRT_PATTERN.m:
            return f"{in_features} input channels are not a multiple of {TENSORRT_PATTERN.m}"
    if in_features % TENSORRT_PATTERN.m or not in_features:
        return f"K = {in_features} is not a multiple of {TENSORRT_PATTERN.m}"
    broken = _violations(view, TENSORRT_PATTERN)
    if not broken:
        return ""
    if pattern is not None and (pattern.n, pattern.m) != (TENSORRT_PATTERN.n, TENSORRT_PATTERN.m):
        return f"pattern {pattern}: TensorRT accelerates {TENSORRT_PATTERN} only"
    return f"breaks {TENSORRT_PATTERN} in {broken} groups"
