"""Small ONNX files written node by node, for what no exporter emits."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
KINDS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def tensor(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return make_tensor_value_info(name, kind, shape)


def write(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    *,
    weights: Sequence[TensorProto] = (),
    opset: int = 20,
    domain: str | None = None,
) -> Path:
    """Write a graph; `domain` is a further one that its operators come from."""
    opsets = [make_opsetid("", opset), *([] if domain is None else [make_opsetid(domain, 1)])]
    onnx.save(
        make_model(make_graph(nodes, "graph", inputs, outputs, weights), opset_imports=opsets, ir_version=10), path
    )
    return path


def products(path: Path, precision: str = "fp32", *, rows: Sequence[int | str] = ("batch",), width: int = 16) -> Path:
    """Two matrix products, `first` and `second`, with float32 input and output and casts around them."""
    generator = np.random.default_rng(0)
    kind, dtype = KINDS[precision], DTYPES[precision]
    weights = [
        numpy_helper.from_array(generator.normal(size=(width, width)).astype(dtype), name) for name in ("w1", "w2")
    ]
    nodes = [
        make_node("Cast", ["x"], ["low"], "enter", to=kind),
        make_node("MatMul", ["low", "w1"], ["hidden"], "first"),
        make_node("MatMul", ["hidden", "w2"], ["high"], "second"),
        make_node("Cast", ["high"], ["y"], "leave", to=TensorProto.FLOAT),
    ]
    return write(path, nodes, [tensor("x", *rows, width)], [tensor("y", *rows, width)], weights=weights, opset=22)
