"""Graphs converted to a half type, run, and asked what they are made of."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, numpy_helper

from tnm_pipeline.export.precision import Half, retype

Array = NDArray[Any]
KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def constant(array: Array, name: str) -> TensorProto:
    return numpy_helper.from_array(array, name)


def retyped(source: Path, precision: Half = "fp16", *, keep: Sequence[str] = ()) -> onnx.ModelProto:
    target = source.with_name(f"retyped.{precision}.onnx")
    retype(source, target, precision, keep=keep)
    return onnx.load(target)


def run(model: onnx.ModelProto | Path, **inputs: Array) -> Array:
    """The output of a graph, of one whose nodes ONNX Runtime leaves as they are."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = onnx.load(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output = session.run(None, inputs)[0]
    assert isinstance(output, np.ndarray)
    return output


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, as ONNX infers it."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}


def computes(model: onnx.ModelProto, name: str) -> int:
    """The element type that the node of this name gives."""
    (output,) = (node.output[0] for node in model.graph.node if node.name == name)
    return types(model)[output]


def operators(graph: GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)
