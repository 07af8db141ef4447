"""Which constant an ONNX node input holds, seen through the nodes that only move or re-type it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True)
class Constant:
    """A constant of a graph.

    Attributes:
        name: The initializer it started from; None for an unnamed one.
        values: What the consuming node sees. Behind a DequantizeLinear: quantised value minus zero point,
            which is zero exactly where the weight is.
    """

    name: str | None
    values: NDArray[np.generic]


def constant_of(value: ir.Value | None) -> Constant | None:
    """Follow a value back to its constant through Transpose, Cast, Identity, Constant and DequantizeLinear.

    Args:
        value: An input of a node; None is an input left out.

    Returns:
        The constant; None when the value depends on an input of the graph or on any other operator.

    Raises:
        ValueError: The constant's data contradicts its type or shape.
    """
    if value is None:
        return None
    if value.const_value is not None:
        return Constant(value.name, value.const_value.numpy())
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        tensor = node.attributes.get_tensor("value")
        return None if tensor is None else Constant(value.name, tensor.numpy())
    if node.op_type not in ("Identity", "Transpose", "Cast", "DequantizeLinear"):
        return None
    source = constant_of(node.inputs[0])
    if source is None:
        return None
    if node.op_type == "Transpose":
        return Constant(source.name, np.transpose(source.values, node.attributes.get_ints("perm")))
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int()).numpy()
        return Constant(source.name, source.values.astype(dtype))
    if node.op_type == "DequantizeLinear":
        return _dequantised(source, node)
    return source


def _dequantised(source: Constant, node: ir.Node) -> Constant | None:
    """Subtract the zero point, which is a scalar, one per slice of `axis`, or one per block along it."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return source
    zero_point = constant_of(node.inputs[2])
    if zero_point is None:
        return None
    points, axis = zero_point.values.astype(np.float32), node.attributes.get_int("axis", 1)
    if points.ndim == 1 and points.size > 1:
        rank = source.values.ndim
        points = np.expand_dims(points, [i for i in range(rank) if i != axis % rank])
    elif points.ndim > 1:
        points = np.repeat(points, node.attributes.get_int("block_size", 0), axis)
        points = np.take(points, np.arange(source.values.shape[axis]), axis)
    return Constant(source.name, source.values.astype(np.float32) - points)
