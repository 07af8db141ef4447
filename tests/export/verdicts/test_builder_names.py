"""Names as builders wrote them, and as the parser that is installed makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tnm_pipeline.export.verdicts.builder_names import BuilderNames, Meaning, node_name

NODES = ("Conv_0", "Conv_1", "Relu_2", "conv", "/layers.0/q/MatMul", "/layers.0/k/MatMul", "node_of_y")


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("Conv_0", {"Conv_0"}),
        ("Conv_0 + Relu_2", {"Conv_0", "Relu_2"}),
        ("Conv_0 || Conv_1", {"Conv_0", "Conv_1"}),
        ("Conv_0 + Add_9 + Relu_2", {"Conv_0", "Relu_2"}),
        ("conv_1", {"conv"}),  # the second layer of this name
        ("node_of_y", {"node_of_y"}),
        ("/layers_0/q/MatMul+/layers_0/k/MatMul_myl0_9", {"/layers.0/q/MatMul", "/layers.0/k/MatMul"}),
        ("__myl_AddCastMean_myl0_8", set()),
        ("(Unnamed Layer* 3) [Convolution]", set()),
        ("PWN(PWN(relu_1), add_1)", set()),
        ("", set()),
    ],
)
def test_names_of_the_log(name: str, nodes: set[str]) -> None:
    assert BuilderNames(NODES).read(name) == Meaning(frozenset(nodes))


def test_a_region_names_nothing_without_metadata() -> None:
    names = BuilderNames(NODES)
    assert names.read("{ForeignNode[Conv_0...Relu_2]}") == Meaning(frozenset(), region=True)
    entry = {"Name": "{ForeignNode[w...Relu_2]}", "Metadata": "[ONNX Layer: Conv_0]\x1e[ONNX Layer: Relu_2]"}
    assert names.read_entry(entry) == Meaning(frozenset({"Conv_0", "Relu_2"}), region=True)


@pytest.mark.parametrize("separator", ["\x1e", ""])
def test_metadata_goes_before_the_name(separator: str) -> None:
    metadata = separator.join(("[ONNX Layer: Conv_1]", "[ONNX Layer: other [Conv]]", "[ONNX Layer: Relu_2]"))
    entry = {"Name": "Conv_0", "Metadata": metadata + separator}
    assert BuilderNames(NODES).read_entry(entry) == Meaning(frozenset({"Conv_1", "Relu_2"}))
    assert BuilderNames(NODES).read_entry({"Name": "Conv_0", "Metadata": ""}) == Meaning(frozenset({"Conv_0"}))


def test_the_installed_parser_names_layers_like_that(tmp_path: Path) -> None:
    """Two nodes of one name, and one without."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx has no wheel for this platform")
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="fc"),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="fc"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", value[:1], value[1:], [weight])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [(layer.name, layer.metadata) for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    assert found == [("fc", "[ONNX Layer: fc]"), ("node_of_b", "[ONNX Layer: node_of_b]"), ("fc_0", "[ONNX Layer: fc]")]
    names = BuilderNames(node_name(node.name, node.output[0]) for node in nodes)
    assert [names.read(name).nodes for name, _ in found] == [{"fc"}, {"node_of_b"}, {"fc"}]
