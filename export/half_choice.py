"""Which inputs and outputs of a float32 graph's nodes can be a half type, and which had better not be."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.graph import STANDARD, nodes_of, subgraphs, title

# Sums over many steps, positions above 2048, and orders, bits or non-zeros that rounding would change.
_FLOAT32_OPERATORS = frozenset(("BitCast", "CumProd", "CumSum", "NonZero", "Range", "TopK"))
_PRODUCTS = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
# What these give is float32 by an attribute or by a scale, which is changed along with them.
_RETYPED = frozenset(("Cast", "ConstantOfShape", "DequantizeLinear"))


@dataclass(frozen=True)
class Choice:
    """Where a graph is half.

    Attributes:
        inputs: (node, index of the input): a float32 input that can be half. An input that is not in here stays
            float32, except that of a Cast, which takes any type.
        outputs: Values that were float32 and become half.
        exact: Nodes that count, in float32, though half would be allowed: positions and masks made from integers.
    """

    inputs: Collection[tuple[ir.Node, int]]
    outputs: Collection[ir.Value]
    exact: Collection[ir.Node]


def choose(model: ir.Model, half: ir.DataType, keep: Collection[str]) -> Choice:
    """Choose by what ONNX's schemas allow, save for operators and nodes that are better off in float32.

    Args:
        model: Every value typed, constants as initializers.
        half: FLOAT16 or BFLOAT16.
        keep: Names of nodes that stay in float32.

    Returns:
        The choice; per node, as operators tell the types of their inputs apart.

    Raises:
        ExportRejected: The type of a value is unknown.
    """
    inputs: set[tuple[ir.Node, int]] = set()
    outputs: set[ir.Value] = set()
    exact: set[ir.Node] = set()
    counted: set[ir.Value] = set()
    for node in nodes_of(model):
        _check_typed(node)
        if _counts(node, counted):
            counted.update(_floats(node.outputs))
            if node.name not in keep:
                exact.add(node)
        elif not _stays(node, half, keep):
            taken, given = _half_parts(model, node, half)
            inputs.update((node, index) for index in taken)
            outputs.update(node.outputs[index] for index in given)
    for node in exact:
        only_half = all((use.node, use.idx) in inputs for value in node.outputs for use in value.uses())
        if node.op_type == "Cast" and only_half:
            outputs.update(value for value in node.outputs if not value.is_graph_output())
    return Choice(inputs, outputs, exact)


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value is a tensor of float32, not left out, and not a sequence of them."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _floats(values: Collection[ir.Value | None]) -> Iterator[ir.Value]:
    return (value for value in values if value is not None and is_float32(value))


def _check_typed(node: ir.Node) -> None:
    for value in (*node.inputs, *filter(_is_used, node.outputs)):
        if value is not None and value.type is None:
            source = value.producer() or node
            raise ExportRejected(
                f"the type of {value.name!r}, of {title(source)}, is unknown, so nobody can say whether it is to "
                "become half: add its value_info to the graph, or keep the model in fp32"
            )


def _counts(node: ir.Node, counted: Collection[ir.Value]) -> bool:
    """Whether a node makes positions or masks: from integers and constants alone, and by no product.

    bf16 has no integers above 256 and fp16 none above 2048, so a sinus of such positions would be noise.
    """
    if node.op_type == "Cast" and node.inputs[0] is not None and is_float32(node.outputs[0]):
        source = node.inputs[0].dtype
        return source is not None and source.is_integer()
    if node.op_type == "Range":
        return is_float32(node.outputs[0])
    made = [value for value in _floats(node.inputs) if value.const_value is None]
    plain = node.domain in STANDARD and node.op_type not in _PRODUCTS and not any(subgraphs(node))
    return plain and bool(made) and all(value in counted for value in made)


def _stays(node: ir.Node, half: ir.DataType, keep: Collection[str]) -> bool:
    sequences = any(value is not None and not isinstance(value.type, ir.TensorType) for value in node.inputs)
    sequences |= any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in node.outputs)
    named = node.name in keep or node.op_type in _FLOAT32_OPERATORS
    return named or sequences or any(subgraphs(node)) or _has_tiny_scale(node, half)


def _has_tiny_scale(node: ir.Node, half: ir.DataType) -> bool:
    """Whether a quantisation scale is so small that a half type keeps only a few bits of it."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
        return False
    scale = node.inputs[1]
    if scale is None or scale.const_value is None:
        return False
    values = np.abs(scale.const_value.numpy().astype(np.float64))
    smallest_normal = 2.0**-14 if half == ir.DataType.FLOAT16 else 2.0**-126
    return bool(((values > 0) & (values < smallest_normal)).any())


def _half_parts(model: ir.Model, node: ir.Node, half: ir.DataType) -> tuple[list[int], list[int]]:
    """The indices of a node's float32 inputs and outputs that its schema lets be half together."""
    schema = _schema(model, node)
    if schema is None:
        return [], []
    allowed = f"tensor({half.name.lower()})"
    inputs = {
        index: parameter.type_str
        for index, value in enumerate(node.inputs)
        if is_float32(value) and allowed in (parameter := _parameter(schema.inputs, index)).types
    }
    outputs = {
        index: parameter.type_str
        for index, value in enumerate(node.outputs)
        if is_float32(value) and allowed in (parameter := _parameter(schema.outputs, index)).types
    }
    if node.op_type == "Cast":
        return [], list(outputs)
    if node.op_type in _RETYPED and "output_dtype" not in node.attributes:
        return list(inputs), list(outputs)
    follow = {index: text for index, text in outputs.items() if text in inputs.values()}
    if any(_is_used(node.outputs[index]) for index in outputs.keys() - follow.keys()):
        return [], []  # an attribute says that they are float32
    return list(inputs), list(follow)


def _parameter(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The last one of an operator may stand for any number of them."""
    return parameters[min(index, len(parameters) - 1)]


def _schema(model: ir.Model, node: ir.Node) -> onnx.defs.OpSchema | None:
    if node.domain not in STANDARD:
        return None  # nobody knows what types it takes
    versions = [version for domain, version in model.opset_imports.items() if domain in STANDARD]
    return onnx.defs.get_schema(node.op_type, max(versions), "")
