"""N:M of every weight in an ONNX file, along the axis that TensorRT reads."""

import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.counting import TENSORRT_PATTERN, WEIGHTED_OPS, gemm_shape, view_of, violations, why_not
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.graph import STANDARD, nodes_of, open_onnx, title
from tnm_pipeline.export.weights import Constant, Unread, Weights
from tnm_pipeline.training.pattern import Pattern

# They multiply by weights too, which nobody can hold to N:M through them.
_OTHER_PRODUCTS = frozenset(
    ("ConvInteger", "DeformConv", "Einsum", "GRU", "LSTM", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RNN")
)
_SCOPE = re.compile(r"'([^'\\]*)'")  # of the list of strings that torch writes with repr


@dataclass(frozen=True)
class LayerSparsity:
    """One weight of one node, counted.

    Attributes:
        name: The torch layer (`"layer1.conv"`, no `.weight`); in a foreign file the initializer or the node.
        node: The ONNX node.
        op: `"MatMul"`, `"Gemm"`, `"Conv"` or `"ConvTranspose"`.
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
        output: Name of the node's first output, which tells nodes without a name apart.
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
    output: str = ""

    @property
    def weights(self) -> int:
        """How many weights there are, zeros included."""
        return math.prod(self.shape)

    @property
    def holds(self) -> bool:
        """Whether the weight keeps its pattern: along K, and for a transposable one along O too."""
        if self.pattern is None:
            return True
        transposable = Pattern.parse(self.pattern).transposable
        return not self.violations and not (transposable and self.violations_transposed)


@dataclass(frozen=True)
class UnreadWeight:
    """A weight that nothing can be said of.

    Attributes:
        name: As in `LayerSparsity`.
        node: The ONNX node.
        op: Its operator, with the domain if that is not ONNX's own.
        why: Why it was not read, and what to do.
    """

    name: str
    node: str
    op: str
    why: str


@dataclass(frozen=True)
class SparsityReport:
    """Every weight of an ONNX file.

    Attributes:
        layers: In graph order; a weight used by two nodes appears twice.
        missing: Layers that were asked about by name and that no node uses, sorted.
        unread: Weights that could not be followed to their values or that are not of a product which is counted.
    """

    layers: tuple[LayerSparsity, ...]
    missing: tuple[str, ...]
    unread: tuple[UnreadWeight, ...] = ()

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
        unread = [asdict(weight) for weight in self.unread]
        return {**self.summary(), "missing": list(self.missing), "unread": unread, "per_layer": layers}

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
    """Count N:M violations in the weight of every MatMul, Gemm, Conv and ConvTranspose, in O(weights).

    Args:
        path: An ONNX file of any origin, weights inside or beside it, of any numeric type; also behind nodes that move,
            re-type or quantise them, in Constant nodes, in the bodies of If, Loop and Scan, and in local functions.
        patterns: Torch layer name -> the pattern it should hold.
        default: The pattern of every layer that `patterns` does not name; None asks for none.

    Returns:
        The report. What is computed from inputs of the graph is an activation, and not in it.

    Raises:
        ExportRejected: The file is missing or malformed.
    """
    patterns = {} if patterns is None else patterns
    model = open_onnx(path)
    weights = Weights(model)
    layers: list[LayerSparsity] = []
    unread: list[UnreadWeight] = []
    missing = set(patterns)
    for node in nodes_of(model):
        try:
            for constant, left in _operands(node, weights):
                name = _name(node, constant.name, missing)
                if isinstance(constant, Constant):
                    layers.append(_count(node, name, constant, patterns.get(name, default), left=left))
                    missing.discard(name)
                else:
                    operator = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
                    unread.append(UnreadWeight(name, node.name or "", operator, constant.why))
        except Exception as error:  # data that contradict their shape or type fail in numpy, in many ways
            raise ExportRejected(
                f"the weight of {title(node)} in {path.name} cannot be read: {error}. "
                "Write the file again with the tool it came from"
            ) from error
    return SparsityReport(tuple(layers), tuple(sorted(missing)), tuple(unread))


def _operands(node: ir.Node, weights: Weights) -> Iterator[tuple[Constant | Unread, bool]]:
    """The weight of a node, if it has one, and whether it is the left operand."""
    if node.domain not in STANDARD or node.op_type in _OTHER_PRODUCTS:
        yield from ((weight, False) for weight in _not_counted(node, weights))
        return
    if node.op_type not in WEIGHTED_OPS or len(node.inputs) < 2:
        return
    weight = weights.read(node.inputs[1])
    left = weight is None and node.op_type in ("MatMul", "Gemm")
    if left:
        weight = weights.read(node.inputs[0])
    if weight is not None:
        yield weight, left


def _not_counted(node: ir.Node, weights: Weights) -> Iterator[Unread]:
    """At most one for all the matrices that a node takes which is no product that is counted."""
    for value in node.inputs:
        constant = weights.read(value)
        if isinstance(constant, Constant) and constant.values.ndim >= 2:
            yield Unread(f"{title(node)} is not among what is counted: {', '.join(WEIGHTED_OPS)}", constant.name)
            return


def _name(node: ir.Node, initializer: str | None, asked: Set[str]) -> str:
    """What torch called this layer: by its parameter, or by the module that ran it if only that is asked about.

    The exporter keeps one initializer for tied weights and for weights that happen to be equal, under the name of
    one of them.
    """
    scopes = [scope for scope in _SCOPE.findall(node.metadata_props.get(NAME_SCOPES, ""))[:-1] if scope]
    parameter = initializer or ""
    # val_N is what torch's exporter calls a constant that has no parameter.
    nameless = not parameter or parameter.removeprefix("val_").isdigit()
    names = [] if nameless else [parameter.removesuffix(".weight")]
    names += [*scopes[-1:], parameter or node.name or f"{node.op_type} without a name"]
    return next((name for name in names if name in asked), names[0])


def _count(node: ir.Node, name: str, weight: Constant, pattern: Pattern | None, *, left: bool) -> LayerSparsity:
    kept = weight.values != 0
    view = view_of(node, kept, left=left)
    rule = TENSORRT_PATTERN if pattern is None else pattern
    broken = violations(view, rule)
    as_tensorrt = (rule.n, rule.m) == (TENSORRT_PATTERN.n, TENSORRT_PATTERN.m)
    broken_2_4 = broken if as_tensorrt else violations(view, TENSORRT_PATTERN)
    why = why_not(node, view, pattern, rank=kept.ndim, left=left, broken=broken_2_4)
    return LayerSparsity(
        name=name,
        node=node.name or "",
        op=node.op_type,
        shape=kept.shape,
        gemm_shape=gemm_shape(node, view),
        pattern=None if pattern is None else str(pattern),
        density=float(np.count_nonzero(kept)) / kept.size if kept.size else 0.0,
        groups=view.shape[0] * view.shape[1] * -(-view.shape[2] // rule.m),
        violations=broken,
        violations_transposed=violations(view.swapaxes(1, 2), rule),
        eligible=not why,
        why=why,
        output=node.outputs[0].name or "",
    )
