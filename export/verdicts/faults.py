"""A second look at a weight: why TensorRT cannot take it for sparse, and why it may not want to."""

from collections.abc import Iterator

import onnx_ir as ir

from tnm_pipeline.export.counting import TENSORRT_PATTERN, Mask, group_count, view_of, violations
from tnm_pipeline.export.graph import nodes_of
from tnm_pipeline.export.reasons import WIDE, Finding, finding
from tnm_pipeline.export.sparsity import LayerSparsity
from tnm_pipeline.export.verdicts.builder_names import node_name
from tnm_pipeline.export.weights import Constant, Weights
from tnm_pipeline.training.pattern import Pattern

_UNPRUNED = 0.99  # a weight that training left alone has few zeros, but may have some
_COARSER = (Pattern(4, 8), Pattern(8, 16))  # half of the weights as well, in groups that 2:4 does not follow from
_ALIGNMENT, _ALIGNMENT_INT8 = 16, 32  # TensorRT's developer guide, "Optimizing for Tensor Cores": for sparse math


class Faults:
    """Looks at the nodes of one model again."""

    def __init__(self, model: ir.Model) -> None:
        self._weights = Weights(model)
        # By its name too: functions of one model may use the same names of outputs.
        self._nodes = {
            (node.name or "", node.op_type, value.name): node for node in nodes_of(model) for value in node.outputs
        }
        # What a builder may call them.
        self.names = [
            node_name(node.name or "", node.outputs[0].name or "") for node in nodes_of(model) if node.outputs
        ]

    def exclusion(self, layer: LayerSparsity) -> Finding:
        """Why a weight that is not eligible is not."""
        node = self._node(layer)
        length = layer.shape[1] if layer.op == "Conv" else layer.gemm_shape[1]
        left = layer.op != "Conv" and self._weights.read(node.inputs[1]) is None
        if layer.op == "ConvTranspose":
            return finding("transposed-convolution")
        if left:
            return finding("left-operand")
        if len(layer.shape) == 1:
            return finding("vector")
        if layer.op == "Conv" and group_count(node) > 1:
            return finding("grouped-convolution", groups=group_count(node))
        if layer.op == "Conv" and 0 < length < TENSORRT_PATTERN.m:
            return finding("stem", channels=length)
        if length % TENSORRT_PATTERN.m or not length:
            return finding("length-not-multiple", length=length)
        if layer.density >= _UNPRUNED:
            return finding("not-pruned", kept=layer.density)
        weight = self._weights.read(node.inputs[1])
        assert isinstance(weight, Constant)  # or it would not have been counted
        return _misplaced(layer, node, weight.values != 0)

    def risks(self, layer: LayerSparsity) -> tuple[Finding, ...]:
        """What is documented to favour dense tactics for a weight that is eligible."""
        outputs, inputs = layer.gemm_shape
        channels = layer.shape[1] if layer.op == "Conv" else inputs
        quantised, dtype = self._storage(self._node(layer).inputs[1])
        alignment = _ALIGNMENT_INT8 if quantised else _ALIGNMENT
        return tuple(
            finding(key, outputs=outputs, inputs=size, alignment=alignment)
            for key, size, applies in (
                ("small-layer", inputs, min(outputs, inputs) < WIDE),
                ("not-aligned", channels, bool(outputs % alignment or channels % alignment)),
                ("quantised", inputs, quantised),
                ("precision-fp32", inputs, not quantised and dtype == ir.DataType.FLOAT),
            )
            if applies
        )

    def _node(self, layer: LayerSparsity) -> ir.Node:
        return self._nodes[layer.node, layer.op, layer.output]

    def _storage(self, value: ir.Value | None) -> tuple[bool, ir.DataType | None]:
        """Whether Q/DQ nodes stand between a product and its weight, and the type that the product sees."""
        route = list(_route(value))
        casts = [node.attributes.get_int("to", 0) for node in route if node.op_type == "Cast"]
        start = value if not route else route[-1].inputs[0]
        dtype = ir.DataType(casts[0]) if casts else None if start is None else start.dtype
        return any("uantize" in node.op_type for node in route), dtype


def _misplaced(layer: LayerSparsity, node: ir.Node, kept: Mask) -> Finding:
    """Where the zeros of a pruned weight are, if not in 2:4 along K."""
    view = view_of(node, kept, left=False)
    asked = None if layer.pattern is None else Pattern.parse(layer.pattern)
    coarser = () if asked is None or asked.m == TENSORRT_PATTERN.m else (asked,)
    for pattern in (*coarser, *_COARSER):
        if view.shape[2] % pattern.m == 0 and not violations(view, pattern):
            return finding("other-pattern", pattern=f"{pattern.n}:{pattern.m}")
    if view.shape[1] % TENSORRT_PATTERN.m == 0 and not violations(view.swapaxes(1, 2), TENSORRT_PATTERN):
        return finding("wrong-axis")
    flat = kept.reshape(1, kept.shape[0], -1)
    if layer.op == "Conv" and not violations(flat, TENSORRT_PATTERN):
        return finding("wrong-axis-convolution")
    groups = view.size // TENSORRT_PATTERN.m
    return finding("breaks-pattern", broken=violations(view, TENSORRT_PATTERN), groups=groups)


def _route(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes between a product and its weight, nearest first."""
    while value is not None and value.const_value is None and (node := value.producer()) is not None:
        yield node
        value = node.inputs[0] if node.inputs else None
