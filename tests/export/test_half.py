from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.export.conftest import Exported, run_onnx
from tnm_pipeline.export.artifacts import publish_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.half import to_fp16
from tnm_pipeline.export.onnx import export_onnx


@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_fp16_stays_close_and_takes_the_same_arrays(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    inputs = np.random.default_rng(4).standard_normal((6, *exported.sample.shape[1:]), np.float32)
    outputs = run_onnx(exported.fp16, inputs)
    reference = exported.torch_outputs(inputs)
    assert outputs.dtype == np.float32
    assert np.abs(outputs - reference).max() <= 1.5e-3 * np.abs(reference).max()


def test_every_weight_is_typed_fp16_and_zeros_stay_zeros(conv_net: Exported) -> None:
    before = {t.name: t for t in onnx.load(conv_net.fp32).graph.initializer}
    after = {t.name: t for t in onnx.load(conv_net.fp16).graph.initializer}
    for name, tensor in before.items():
        if tensor.data_type == TensorProto.FLOAT:
            assert after[name].data_type == TensorProto.FLOAT16, name
            zeros, still = numpy_helper.to_array(tensor) == 0, numpy_helper.to_array(after[name]) == 0
            np.testing.assert_array_equal(zeros, still)


@pytest.mark.parametrize("as_node", [False, True])
def test_overflow_is_refused_by_name(as_node: bool, tmp_path: Path) -> None:
    large = numpy_helper.from_array(np.array([1.0, -7e4], np.float32), "layer.scale")
    nodes = [helper.make_node("Mul", ["input", "layer.scale"], ["output"])]
    if as_node:
        nodes.insert(0, helper.make_node("Constant", [], ["layer.scale"], value=large))
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "graph", [value], [result], [] if as_node else [large])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    publish_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(ExportRejected, match=r"'layer\.scale'.* holds 70000 and fp16 ends at 65504"):
        to_fp16(tmp_path / "model.onnx", tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


def test_invalid_conversion_is_refused(tmp_path: Path) -> None:
    """Two `Min` nodes stay in float32 and share a constant, which the converter then casts twice by one name."""
    nodes = [
        helper.make_node("Min", ["input", "bound"], ["once"], name="first"),
        helper.make_node("Min", ["once", "bound"], ["output"], name="second"),
    ]
    bound = numpy_helper.from_array(np.ones(2, np.float32), "bound")
    relu = helper.make_node("Mul", ["output", "bound"], ["scaled"])
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])
    result = helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([*nodes, relu], "graph", [value], [result], [bound])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    publish_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(ExportRejected, match="a constant of its own"):
        to_fp16(tmp_path / "model.onnx", tmp_path / "half.onnx")


@pytest.mark.slow
def test_pre_norm_transformer_passes_the_gate(tmp_path: Path) -> None:
    """ONNX Runtime 1.31 with all optimisations crashes on this graph."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    export_onnx(model, torch.zeros(2, 9, 16), tmp_path / "model.onnx")
    to_fp16(tmp_path / "model.onnx", tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").exists()
