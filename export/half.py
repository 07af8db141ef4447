"""An fp32 ONNX graph to a typed fp16 one: strongly typed builders take the precision from the graph alone."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, TensorProto, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from tnm_pipeline.export.artifacts import publish_onnx, read_onnx
from tnm_pipeline.export.errors import ExportRejected

_LARGEST = float(np.finfo(np.float16).max)


def to_fp16(source: Path, target: Path) -> None:
    """Convert weights and compute to fp16; inputs and outputs stay float32, with casts at the edges.

    Zeros stay zeros, so N:M survives. Non-zero values below the smallest fp16 subnormal (6e-8) become it.
    Operators without a useful fp16 form (`TopK`, `CumSum`, `Range`, ...) keep float32 between casts.

    Args:
        source: A float32 ONNX file with its weights inside.
        target: The file to write; its folder exists.

    Raises:
        ExportRejected: `source` is not ONNX, a constant exceeds fp16's 65504, or the result fails the gate of
            `publish_onnx`.
        OSError: The folder is missing, read-only or full.
    """
    model = read_onnx(source)
    for owner, tensor in _constants(model.graph):
        _check_range(owner, tensor)
    half = convert_float_to_float16(model, keep_io_types=True)
    try:
        converted = ir.from_proto(half)
    except ir.serde.SerdeError as error:
        # Seen where two operators that stay in float32 share a constant: the converter casts it twice, by one name.
        raise ExportRejected(
            f"the fp16 converter made an invalid graph of {source.name}: {error.__cause__ or error}. "
            "Give each operator that stays in float32 a constant of its own, or keep the model in fp32"
        ) from error
    converted.graph.sort()  # the converter appends its casts at the end, where checkers want them in order
    publish_onnx(ir.to_proto(converted), target)


def _constants(graph: GraphProto) -> list[tuple[str, TensorProto]]:
    """Every float32 tensor of a graph with the name a message should use, subgraphs included."""
    found = [(f"initializer {tensor.name!r}", tensor) for tensor in graph.initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                found.append((f"constant {node.output[0]!r} ({node.op_type})", attribute.t))
            elif attribute.type == AttributeProto.GRAPH:
                found.extend(_constants(attribute.g))
    return [(owner, tensor) for owner, tensor in found if tensor.data_type == onnx.TensorProto.FLOAT]


def _check_range(owner: str, tensor: TensorProto) -> None:
    values = np.abs(numpy_helper.to_array(tensor))
    finite = values[np.isfinite(values)]
    if finite.size and float(finite.max()) > _LARGEST:
        raise ExportRejected(
            f"{owner} holds {float(finite.max()):.6g} and fp16 ends at {_LARGEST:g}: "
            "rescale that layer, or keep the model in fp32"
        )
