"""Graphs at random around weights that are known, with the counts of them made by loops over single entries."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    np_dtype_to_tensor_dtype,
)

Array = NDArray[Any]
COMPUTE = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
STORED = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int32, ml_dtypes.float8_e4m3fn)
QUANTISED = (np.int8, np.uint8, np.int16, np.uint16, ml_dtypes.int4, ml_dtypes.uint4)
OPSETS = [make_opsetid("", 21), make_opsetid("own", 1)]


@dataclass
class Sample:
    """A file with one product, and what is in its weight."""

    path: Path
    operator: str
    left: bool
    groups: int  # of a convolution
    weight: Array  # as the product sees it

    def entries(self) -> Iterator[list[list[bool]]]:
        """For every kernel position or batch: rows of the matrix (O, K), whether each entry is not zero."""
        weight, rank = self.weight, self.weight.ndim
        if self.operator == "Conv":
            for at in np.ndindex(*weight.shape[2:]):
                yield [[bool(weight[(o, k, *at)] != 0) for k in range(weight.shape[1])] for o in range(weight.shape[0])]
        elif self.operator == "ConvTranspose":
            inside = weight.shape[0] // self.groups
            for at in np.ndindex(*weight.shape[2:]):
                yield [
                    [bool(weight[(part * inside + k, o, *at)] != 0) for k in range(inside)]
                    for part in range(self.groups)
                    for o in range(weight.shape[1])
                ]
        else:  # the one on the right is (..., K, O), the one on the left (..., O, K)
            for at in np.ndindex(*weight.shape[: rank - 2]):
                rows, columns = weight.shape[rank - 2 :]
                if self.left:
                    yield [[bool(weight[(*at, o, k)] != 0) for k in range(columns)] for o in range(rows)]
                else:
                    yield [[bool(weight[(*at, k, o)] != 0) for k in range(rows)] for o in range(columns)]

    def broken(self, n: int, m: int, *, transposed: bool = False) -> int:
        """Groups of M with more than N that are not zero."""
        count = 0
        for rows in self.entries():
            lines = [list(line) for line in zip(*rows, strict=True)] if transposed else rows
            for line in lines:
                for start in range(0, len(line), m):
                    count += sum(line[start : start + m]) > n
        return count


@dataclass
class Parts:
    """What stores a weight."""

    rng: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    made: int = 0

    def name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}_{self.made}"

    def add(self, array: Array, kind: str) -> str:
        name = self.name(kind)
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def store(self, array: Array, dtype: Any, depth: int) -> str:
        """Make a value that holds the array, of small whole numbers, in the type; what nodes it takes is chance."""
        forms = ["plain", "constant", "cast"]
        forms += ["transpose", "reshape", "squeeze", "unsqueeze", "flatten", "identity"] if depth else []
        forms += ["dequantise", "pair"] if dtype == np.float32 else []
        form: str = self.rng.choice(forms)
        name: str = getattr(self, f"_{form}")(array, dtype, depth)
        return name

    def _plain(self, array: Array, dtype: Any, _: int) -> str:
        return self.add(array.astype(dtype), "initializer")

    def _constant(self, array: Array, dtype: Any, _: int) -> str:
        name = self.name("constant")
        if dtype == np.float32 and self.rng.random() < 0.5:
            self.nodes.append(make_node("Constant", [], [name], value_floats=array.astype(float).ravel().tolist()))
            return self._node("Reshape", name, self.add(np.array(array.shape), "shape"))
        tensor = numpy_helper.from_array(array.astype(dtype))
        self.nodes.append(make_node("Constant", [], [name], value=tensor))
        return name

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = self.name(operator)
        self.nodes.append(make_node(operator, inputs, [name], **attributes))
        return name

    def _cast(self, array: Array, dtype: Any, depth: int) -> str:
        stored = STORED[self.rng.integers(len(STORED))]
        source = self.store(array, stored, depth - 1) if depth > 0 else self._plain(array, stored, 0)
        return self._node("Cast", source, to=np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _identity(self, array: Array, dtype: Any, depth: int) -> str:
        return self._node("Identity", self.store(array, dtype, depth - 1))

    def _transpose(self, array: Array, dtype: Any, depth: int) -> str:
        if self.rng.random() < 0.3:  # no perm: all axes backwards
            return self._node("Transpose", self.store(array.T, dtype, depth - 1))
        perm = self.rng.permutation(array.ndim)
        stored = np.empty([array.shape[list(perm).index(axis)] for axis in range(array.ndim)], array.dtype)
        for index in np.ndindex(*array.shape):  # axis i of the result is axis perm[i] of what is stored
            at = [0] * array.ndim
            for axis, source in enumerate(perm):
                at[source] = index[axis]
            stored[tuple(at)] = array[index]
        return self._node("Transpose", self.store(stored, dtype, depth - 1), perm=perm.tolist())

    def _reshape(self, array: Array, dtype: Any, depth: int) -> str:
        flat = self.store(array.reshape(-1, array.shape[-1]), dtype, depth - 1)
        target = list(array.shape)
        if array.ndim == 2 and self.rng.random() < 0.5:
            target[self.rng.integers(2)] = 0  # as it is
        elif self.rng.random() < 0.5:
            target[self.rng.integers(array.ndim)] = -1
        return self._node("Reshape", flat, self.add(np.array(target), "shape"))

    def _unsqueeze(self, array: Array, dtype: Any, depth: int) -> str:
        one = self._node("Unsqueeze", self.store(array, dtype, depth - 1), self.add(np.array([0, -1]), "axes"))
        return (
            self._node("Squeeze", one)
            if 1 not in array.shape
            else self._node("Squeeze", one, self.add(np.array([-1, 0]), "axes"))
        )

    def _squeeze(self, array: Array, dtype: Any, depth: int) -> str:
        axis = int(self.rng.integers(array.ndim + 1))
        wide = self.store(np.expand_dims(array, axis), dtype, depth - 1)
        return self._node("Squeeze", wide, self.add(np.array([axis]), "axes"))

    def _flatten(self, array: Array, dtype: Any, depth: int) -> str:
        if array.ndim != 2:
            return self._identity(array, dtype, depth)
        high = self.store(array.reshape(array.shape[0], 1, array.shape[1]), dtype, depth - 1)
        return self._node("Flatten", high)

    def _dequantise(self, array: Array, _: Any, depth: int) -> str:
        """Whole numbers from -3 to 3, moved by zero points that are one in all, one a slice, or one a block."""
        dtype = np.dtype(QUANTISED[self.rng.integers(len(QUANTISED))])
        low = 4 if dtype.name.startswith("uint") else -4
        kind, axis = self.rng.choice(["none", "one", "slice", "block"]), int(self.rng.integers(array.ndim))
        sides = [(array.shape[axis] + 2) // 3 if i == axis else side for i, side in enumerate(array.shape)]
        shape = {"none": (), "one": (), "slice": (array.shape[axis],), "block": tuple(sides)}[kind]
        points = np.zeros(shape, int) if kind == "none" else self.rng.integers(low, low + 8, shape)
        spread = points
        if kind == "slice":
            spread = points.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        elif kind == "block":
            spread = np.repeat(points, 3, axis).take(range(array.shape[axis]), axis)
        quantised = array + spread
        info: Any = ml_dtypes.iinfo(dtype) if "4" in dtype.name else np.iinfo(dtype)  # type: ignore[no-untyped-call]
        if quantised.min() < info.min or quantised.max() > info.max:  # does not fit: store it as it is
            return self._plain(array, np.float32, 0)
        inputs = [self.add(quantised.astype(dtype), "quantised"), self.add(np.full(shape, 0.5, np.float32), "scale")]
        inputs += [] if kind == "none" else [self.add(points.astype(dtype), "point")]
        block = {"block_size": 3} if kind == "block" else {}
        return self._node("DequantizeLinear", *inputs, axis=axis - array.ndim * int(self.rng.integers(2)), **block)

    def _pair(self, array: Array, _: Any, depth: int) -> str:
        """A float weight that is rounded on its way: what lies within half a step of zero is one."""
        noise = self.rng.uniform(-0.4, 0.4, array.shape)
        stored = self.add(((array + noise) * 0.25).astype(np.float32), "float")
        parameters = [self.add(np.array(0.25, np.float32), "scale"), self.add(np.array(-5, np.int8), "point")]
        return self._node("DequantizeLinear", self._node("QuantizeLinear", stored, *parameters), *parameters)


def sample(rng: np.random.Generator, path: Path) -> Sample:
    """Draw an operator, a shape, zeros, a type, what stands between the weight and the operator, and what around."""
    operator = str(rng.choice(["MatMul", "Gemm", "Conv", "ConvTranspose"]))
    left = operator in ("MatMul", "Gemm") and rng.random() < 0.2
    groups = int(rng.choice([1, 1, 2])) if "Conv" in operator else 1
    if "Conv" in operator:
        kernel = rng.integers(1, 4, rng.integers(1, 4))
        shape = [int(rng.integers(1, 9)) * groups, int(rng.integers(1, 18)), *kernel.tolist()]
    else:
        shape = rng.integers(1, 18, rng.integers(2, 5) if operator == "MatMul" else 2).tolist()
        shape = [*(min(side, 3) for side in shape[:-2]), *shape[-2:]]
    weight = rng.integers(-3, 4, shape)
    weight[rng.random(shape) < rng.choice([0.3, 0.5, 0.7])] = 0
    parts, dtype = Parts(rng), COMPUTE[rng.integers(len(COMPUTE))]
    attributes: dict[str, Any] = {"group": groups} if "Conv" in operator else {}
    seen = weight
    if operator == "Gemm" and rng.random() < 0.5:
        attributes, seen = {"transA" if left else "transB": 1}, weight.T
    name = parts.store(seen, dtype, int(rng.integers(4)))
    node = make_node(operator, [name, "x"] if left else ["x", name], ["y"], "product", **attributes)
    _write(rng, path, parts, node, np_dtype_to_tensor_dtype(np.dtype(dtype)))
    return Sample(path, operator, bool(left), groups, weight)


def _write(rng: np.random.Generator, path: Path, parts: Parts, node: NodeProto, kind: int) -> None:
    """The product in the graph, in a branch with its weights inside or outside, or in a function."""
    inputs, outputs = [make_tensor_value_info("x", kind, ["any"])], [make_tensor_value_info("y", kind, ["any"])]
    around = rng.choice(["graph", "branch", "inside", "function"])
    functions = []
    if around == "graph":
        graph = make_graph([*parts.nodes, node], "graph", inputs, outputs, parts.weights)
    elif around == "function":
        call = make_node("Own", list(node.input), ["y"], "call", domain="own")
        functions = [make_function("own", "Own", list(node.input), ["y"], [node], OPSETS)]
        graph = make_graph([*parts.nodes, call], "graph", inputs, outputs, parts.weights)
    else:
        node.output[0] = "z"
        result = [make_tensor_value_info("z", kind, ["any"])]
        own = (parts.nodes, parts.weights) if around == "inside" else ([], [])
        branch = make_graph([*own[0], node], "branch", [], result, own[1])
        other = make_graph([make_node("Identity", ["x"], ["z"])], "other", [], result)
        choice = make_node("If", ["flag"], ["y"], "choice", then_branch=branch, else_branch=other)
        flag = make_tensor_value_info("flag", TensorProto.BOOL, [])
        outside = ([], []) if around == "inside" else (parts.nodes, parts.weights)
        graph = make_graph([*outside[0], choice], "graph", [*inputs, flag], outputs, outside[1])
    _save(rng, path, graph, functions)


def _save(rng: np.random.Generator, path: Path, graph: GraphProto, functions: list[onnx.FunctionProto]) -> None:
    model = make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)
    beside = bool(rng.random() < 0.3)
    onnx.save(model, path, save_as_external_data=beside, location=f"{path.name}.data", size_threshold=0)
