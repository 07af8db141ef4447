"""Which constant an ONNX node input holds, seen through the nodes that only move, re-type or quantise it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tnm_pipeline.export.graph import STANDARD, subgraphs, title

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Constant:
    """A constant of a graph.

    Attributes:
        name: The initializer it started from; None for an unnamed one.
        values: What the consuming node sees.
    """

    name: str | None
    values: Array


@dataclass(frozen=True)
class Unread:
    """A value that no input of the graph can change, but whose content cannot be told.

    Attributes:
        why: Why not, and what to do about it.
        name: The initializer it starts from, where that is known.
    """

    why: str
    name: str | None = None


class Weights:
    """Follows values of one model back to their constants."""

    def __init__(self, model: ir.Model) -> None:
        self._moving: set[ir.Value] = set()  # depends on what is given at run time
        self._loops: dict[ir.Value, ir.Node] = {}  # inputs of the bodies of loops
        self._walk(model.graph, (None,) * len(model.graph.inputs))

    def _walk(self, graph: ir.Graph, given: Sequence[ir.Value | None]) -> bool:
        """Note which values of a graph move; `given` is what its inputs are outside, None for nothing that is fixed.

        Returns:
            Whether any does.
        """
        for value, outer in itertools.zip_longest(graph.inputs, given[: len(graph.inputs)]):
            if value.const_value is None and (outer is None or self._moves(outer)):
                self._moving.add(value)
        any_moves = bool(self._moving.intersection(graph.inputs))
        for node in graph:
            # A Loop's first two inputs, the trip count and the condition, are other ones at every turn.
            handed = (None, None, *node.inputs[2:]) if node.op_type == "Loop" else node.inputs
            bodies = list(subgraphs(node))
            self._loops |= {value: node for body in bodies for value in body.inputs}
            inside = [self._walk(body, handed) for body in bodies]
            if any(inside) or any(self._moves(value) for value in node.inputs if value is not None):
                self._moving.update(node.outputs)
                any_moves = True
        return any_moves

    def _moves(self, value: ir.Value) -> bool:
        nowhere = value.producer() is None and value.const_value is None and value not in self._loops
        return nowhere or value in self._moving

    def read(self, value: ir.Value | None) -> Constant | Unread | None:
        """Follow a value back through Transpose, Cast, Reshape and the like, and through Q/DQ pairs.

        Args:
            value: An input of a node; None is an input left out.

        Returns:
            The constant; None where the value depends on an input of the graph.

        Raises:
            ValueError: The constant's data contradict its type or shape.
        """
        passed: list[ir.Node] = []
        while value is not None and value.const_value is None:
            node = value.producer()
            if node is None or node.domain not in STANDARD or node.op_type not in _FOLLOWED:
                return self._unread(value)
            if node.op_type == "Constant":
                break
            passed.append(node)
            value = node.inputs[0] if node.inputs else None
        if value is None:
            return None
        constant = _start(value)
        for node in reversed(passed):
            if isinstance(constant, Unread):
                break
            constant = self._through(node, constant)
        if isinstance(constant, Constant) and constant.values.dtype.kind in "OSUT":
            return Unread("it holds strings")
        return constant

    def _through(self, node: ir.Node, source: Constant) -> Constant | Unread:
        parameters: list[Array | None] = []
        for value in node.inputs[1:]:
            parameter = self.read(value)
            if value is not None and not isinstance(parameter, Constant):
                return Unread(f"{title(node)} between it and its initializer has an input that is computed at run time")
            parameters.append(parameter.values if isinstance(parameter, Constant) else None)
        with np.errstate(all="ignore"):  # overflow and NaN are no zeros, which is all that counts here
            return Constant(source.name, _FOLLOWED[node.op_type](node, source.values, parameters))

    def _unread(self, value: ir.Value) -> Unread | None:
        if self._moves(value):
            return None
        node = value.producer()
        if node is None:
            return Unread(f"{title(self._loops[value])} hands it in, one slice at a time: unroll the loop")
        return Unread(
            f"it comes out of {title(node)}, which is not followed: fold constants first, for example with "
            "`polygraphy surgeon sanitize --fold-constants`"
        )


def _start(value: ir.Value) -> Constant | Unread:
    if value.const_value is not None:
        return Constant(value.name, value.const_value.numpy())
    node = value.producer()
    assert node is not None  # a Constant node
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attribute = node.attributes.get(name)
        if attribute is not None:
            values = attribute.as_tensor().numpy() if name == "value" else np.asarray(attribute.value)
            return Constant(value.name, values)
    return Unread(f"{title(node)} holds {', '.join(node.attributes)}, which is no dense tensor of numbers")


Parameters = list[Array | None]


def _transpose(node: ir.Node, values: Array, _: Parameters) -> Array:
    return np.transpose(values, node.attributes.get_ints("perm"))


def _cast(node: ir.Node, values: Array, _: Parameters) -> Array:
    return values.astype(ir.DataType(node.attributes.get_int("to", 0)).numpy())


def _cast_like(_: ir.Node, values: Array, parameters: Parameters) -> Array:
    return values.astype(_given(parameters, 0).dtype)


def _reshape(node: ir.Node, values: Array, parameters: Parameters) -> Array:
    asked = [int(side) for side in _given(parameters, 0).ravel()]
    if not node.attributes.get_int("allowzero", 0):
        asked = [values.shape[axis] if side == 0 else side for axis, side in enumerate(asked)]
    return values.reshape(asked)


def _squeeze(node: ir.Node, values: Array, parameters: Parameters) -> Array:
    return np.squeeze(values, _axes(node, parameters))


def _unsqueeze(node: ir.Node, values: Array, parameters: Parameters) -> Array:
    return np.expand_dims(values, _axes(node, parameters) or ())


def _flatten(node: ir.Node, values: Array, _: Parameters) -> Array:
    axis = node.attributes.get_int("axis", 1)
    return values.reshape(math.prod(values.shape[:axis]), math.prod(values.shape[axis:]))


def _quantise(node: ir.Node, values: Array, parameters: Parameters) -> Array:
    """Round to the grid of the scale: what lies within half a step of zero becomes the zero point."""
    point = _optional(parameters, 1)
    asked = node.attributes.get_int("output_dtype", 0)
    named = ir.DataType(asked).numpy() if asked else np.dtype(np.uint8)
    dtype = named if point is None else point.dtype
    scaled = values.astype(np.float32) / _spread(_given(parameters, 0), node, values.shape)
    bits = ir.DataType.from_numpy(dtype)
    if not bits.is_integer():
        return scaled.astype(dtype)
    shifted = np.rint(scaled) + (0 if point is None else _spread(point, node, values.shape))
    low, high = (0, 2**bits.bitwidth - 1) if not bits.is_signed() else _signed_range(bits.bitwidth)
    quantised: Array = np.clip(shifted, low, high).astype(dtype)
    return quantised


def _dequantise(node: ir.Node, values: Array, parameters: Parameters) -> Array:
    point = _optional(parameters, 1)
    plain = values.astype(np.float32)
    shifted = plain if point is None else plain - _spread(point, node, values.shape)
    weights: Array = shifted * _spread(_given(parameters, 0), node, values.shape)
    return weights


def _signed_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _spread(parameter: Array, node: ir.Node, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A scale or zero point in float32, so that it meets its weights: one in all, one a slice, or one a block."""
    plain = parameter.astype(np.float32)
    if plain.size == 1:
        return plain.reshape(())
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} of a tensor of shape {shape}")
    axis %= len(shape)
    if plain.ndim == 1 and not block:
        plain = plain.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    elif block > 0 and plain.ndim == len(shape) and plain.shape[axis] == -(-shape[axis] // block):
        plain = np.take(plain, np.arange(shape[axis]) // block, axis)
    if np.broadcast_shapes(plain.shape, shape) != shape:
        raise ValueError(f"a scale or zero point of shape {parameter.shape} for a tensor of shape {shape}")
    return plain


def _axes(node: ir.Node, parameters: Parameters) -> tuple[int, ...] | None:
    """From the second input, or before opset 13 from an attribute."""
    given = _optional(parameters, 0)
    axes = node.attributes.get_ints("axes") if given is None else given.ravel()
    return None if axes is None else tuple(int(axis) for axis in axes)


def _given(parameters: Parameters, index: int) -> Array:
    value = _optional(parameters, index)
    if value is None:
        raise ValueError("an input is left out that the operator needs")
    return value


def _optional(parameters: Parameters, index: int) -> Array | None:
    return parameters[index] if index < len(parameters) else None


def _same(_: ir.Node, values: Array, __: Parameters) -> Array:
    return values


_FOLLOWED: Mapping[str, Callable[[ir.Node, Array, Parameters], Array]] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Constant": _same,
    "DequantizeLinear": _dequantise,
    "Flatten": _flatten,
    "Identity": _same,
    "QuantizeLinear": _quantise,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
