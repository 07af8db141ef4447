"""Graphs of every build in a half type: bodies, functions, quantised weights, files of other exporters."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import GraphProto, NodeProto, TensorProto
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase
from onnx.helper import make_function, make_graph, make_model, make_node, make_opsetid
from onnx.reference import ReferenceEvaluator
from torch import nn

from tests.export.conftest import Exported
from tests.export.graphs import tensor, write
from tests.export.half_graphs import KINDS, computes, constant, operators, retyped, run
from tnm_pipeline.export.artifacts import publish_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import Half, emulated, retype


def _branch(name: str, operator: str) -> GraphProto:
    """A body that uses a weight of its own and a value of the graph around it."""
    nodes = [
        make_node("MatMul", ["hidden", f"{name}.w"], [f"{name}.product"], f"{name}.matmul"),
        make_node(operator, [f"{name}.product"], [f"{name}.y"]),
    ]
    weight = constant(np.eye(2, dtype=np.float32) * 2, f"{name}.w")
    return make_graph(nodes, name, [], [tensor(f"{name}.y", 2, 2)], [weight])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_branches_are_converted_inside(precision: Half, tmp_path: Path) -> None:
    choice = make_node(
        "If", ["flag"], ["chosen"], then_branch=_branch("then", "Neg"), else_branch=_branch("other", "Relu")
    )
    nodes = [make_node("Add", ["x", "x"], ["hidden"]), choice, make_node("Abs", ["chosen"], ["y"])]
    inputs = [tensor("x", 2, 2), tensor("flag", kind=TensorProto.BOOL)]
    source = write(tmp_path / "m.onnx", nodes, inputs, [tensor("y", 2, 2)], opset=22)
    model = retyped(source, precision)
    (node,) = (node for node in model.graph.node if node.op_type == "If")
    for attribute in node.attribute:
        assert [t.data_type for t in attribute.g.initializer] == [KINDS[precision]]
    runnable = model if precision == "fp16" else emulated(tmp_path / "retyped.bf16.onnx")
    x = np.array([[1, -2], [3, 4]], np.float32)
    for flag in (True, False):
        np.testing.assert_array_equal(run(runnable, x=x, flag=np.array(flag)), run(source, x=x, flag=np.array(flag)))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_loops_are_converted_inside(precision: Half, tmp_path: Path) -> None:
    body = make_graph(
        [make_node("Mul", ["state", "factor"], ["next"]), make_node("Identity", ["go"], ["still"])],
        "body",
        [tensor("turn", kind=TensorProto.INT64), tensor("go", kind=TensorProto.BOOL), tensor("state", 2)],
        [tensor("still", kind=TensorProto.BOOL), tensor("next", 2)],
    )
    nodes = [make_node("Loop", ["turns", "", "x"], ["y"], body=body)]
    weights = [constant(np.array(3), "turns"), constant(np.array(1.5, np.float32), "factor")]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 2)], [tensor("y", 2)], weights=weights, opset=22)
    model = retyped(source, precision)
    assert {t.name: t.data_type for t in model.graph.initializer}["factor"] == KINDS[precision]
    runnable = model if precision == "fp16" else emulated(tmp_path / "retyped.bf16.onnx")
    np.testing.assert_array_equal(run(runnable, x=np.array([1, -2], np.float32)), [3.375, -6.75])


def test_functions_and_untyped_values_of_other_exporters(tmp_path: Path) -> None:
    imports = [make_opsetid("", 20), make_opsetid("own", 1)]
    body = [make_node("MatMul", ["a", "b"], ["c"]), make_node("Relu", ["c"], ["d"])]
    function = make_function("own", "Layer", ["a", "b"], ["d"], body, imports)
    nodes = [
        make_node("Layer", ["x", "w1"], ["h"], "one", domain="own"),
        make_node("Layer", ["h", "w2"], ["y"], "two", domain="own"),
    ]
    weights = [constant(np.full((4, 4), value, np.float32), name) for value, name in ((0.5, "w1"), (2, "w2"))]
    graph = make_graph(nodes, "graph", [tensor("x", 2, 4)], [tensor("y", 2, 4)], weights)
    onnx.save(make_model(graph, opset_imports=imports, functions=[function], ir_version=10), tmp_path / "m.onnx")
    model = retyped(tmp_path / "m.onnx")
    assert operators(model.graph) == {"Cast": 2, "MatMul": 2, "Relu": 2}
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.FLOAT16}
    np.testing.assert_array_equal(run(model, x=np.ones((2, 4), np.float32)), np.full((2, 4), 16))


def test_quantisation_scales_that_half_would_ruin_stay(tmp_path: Path) -> None:
    def pair(name: str) -> list[NodeProto]:
        return [
            make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale"], [f"{name}.w"], f"{name}.dequantise"),
            make_node("MatMul", ["x", f"{name}.w"], [f"{name}.y"], name),
        ]

    nodes = [*pair("usual"), *pair("tiny"), make_node("Add", ["usual.y", "tiny.y"], ["y"])]
    weights = [constant(np.arange(16, dtype=np.int8).reshape(4, 4), f"{name}.q") for name in ("usual", "tiny")]
    weights += [constant(np.array(s, np.float32), f"{n}.scale") for n, s in (("usual", 0.25), ("tiny", 1e-7))]
    model = retyped(
        write(tmp_path / "m.onnx", nodes, [tensor("x", 1, 4)], [tensor("y", 1, 4)], weights=weights, opset=21)
    )
    assert [computes(model, f"{name}.dequantise") for name in ("usual", "tiny")] == [10, 1]
    assert [computes(model, name) for name in ("usual", "tiny")] == [10, 10]


def test_bf16_needs_opset_22(mlp: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportRejected, match=r"is of opset 20, .* bf16 from 22 on: export with opset = 22"):
        retype(mlp.fp32, tmp_path / "m.onnx", "bf16")


def test_custom_operators_are_refused_by_name(tmp_path: Path) -> None:
    nodes = [make_node("Magic", ["x"], ["a"], "trick", domain="own"), make_node("Relu", ["a"], ["y"])]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 2)], [tensor("y", 2)], domain="own")
    with pytest.raises(ExportRejected, match=r"type of 'a', of own::Magic node 'trick', is unknown.* value_info"):
        retyped(source)


def test_a_weight_that_is_an_input_too_becomes_a_constant(tmp_path: Path) -> None:
    """As files before IR version 4 have it."""
    graph = make_graph(
        [make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [tensor("x", 1, 2), tensor("w", 2, 2)],
        [tensor("y", 1, 2)],
        [constant(np.eye(2, dtype=np.float32), "w")],
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 8)], ir_version=3), tmp_path / "m.onnx")
    model = retyped(tmp_path / "m.onnx")
    assert [value.name for value in model.graph.input] == ["x"]
    assert [t.data_type for t in model.graph.initializer] == [TensorProto.FLOAT16]


def test_weights_beside_the_source_end_up_where_the_size_says(conv_net: Exported, tmp_path: Path) -> None:
    model = onnx.load(conv_net.fp32)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    retype(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
    assert (tmp_path / "half.onnx").read_bytes() == conv_net.fp16.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.data", "half.onnx"}


def test_an_initializer_that_the_graph_gives_out_stays_float32(tmp_path: Path) -> None:
    nodes = [make_node("Mul", ["x", "w"], ["y"])]
    outputs = [tensor("y", 2), tensor("w", 2)]
    source = write(
        tmp_path / "m.onnx", nodes, [tensor("x", 2)], outputs, weights=[constant(np.ones(2, np.float32), "w")]
    )
    found = {t.name: t.data_type for t in retyped(source).graph.initializer}
    assert found == {"w": TensorProto.FLOAT, "w_fp16": TensorProto.FLOAT16}


def test_the_same_bytes_every_time(conv_net: Exported, tmp_path: Path) -> None:
    retype(conv_net.fp32, tmp_path / "again.onnx", "fp16")
    assert (tmp_path / "again.onnx").read_bytes() == conv_net.fp16.read_bytes()


@pytest.mark.slow
def test_pre_norm_transformer_passes_the_gate(tmp_path: Path) -> None:
    """ONNX Runtime 1.31 with all optimisations crashes on this graph."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    export_onnx(model, torch.zeros(2, 9, 16), tmp_path / "model.onnx")
    retype(tmp_path / "model.onnx", tmp_path / "half.onnx", "fp16")
    assert (tmp_path / "half.onnx").exists()


@pytest.fixture(scope="module")
def examples() -> list[TestCase]:
    """ONNX's own of each operator, in its newest version; they can be made once in a process."""
    return collect_testcases(None)


@pytest.fixture
def without_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime knows neither the newest opset nor all of the operators."""
    publish = partial(publish_onnx, run=False)
    monkeypatch.setattr("tnm_pipeline.export.precision.publish_onnx", lambda *args, **_: publish(*args))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # ONNX's examples of casts overflow on purpose
@pytest.mark.usefixtures("without_session")
def test_every_operator_of_onnx_stays_valid(examples: list[TestCase], tmp_path: Path) -> None:
    precisions: tuple[Half, ...] = ("fp16", "bf16")
    refused, converted = set(), Counter[str]()
    for case in examples:
        assert case.model is not None  # all of these are models
        onnx.save(case.model, tmp_path / "m.onnx")
        for precision in precisions:
            try:
                retype(tmp_path / "m.onnx", tmp_path / "half.onnx", precision)
            except ExportRejected as error:
                refused.add(f"{case.name}: {error}")
            else:
                converted[precision] += 1
    # Of FlexAttention nobody infers the types; the example of MeanVarianceNormalization fails the checker as it is.
    expected = ("is of opset", "test_flexattention", "test_mvn")
    assert not [text for text in refused if not any(part in text for part in expected)]
    assert converted["fp16"] > 1800
    assert converted["bf16"] > 900


# Random numbers; numbers that fp16 does not tell apart; a product beyond 65504; steps finer than fp16's; a pole.
_OTHERWISE = {
    "test_bernoulli_double",
    "test_logsoftmax_large_number",
    "test_logsoftmax_large_number_expanded_ver18",
    "test_quantizelinear_int16",
    "test_quantizelinear_uint16",
    "test_reduce_prod_default_axes_keepdims_example",
    "test_softmax_large_number",
    "test_softmax_large_number_expanded_ver18",
    "test_tan",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of ONNX's reference implementation, which warns of many things
@pytest.mark.usefixtures("without_session")
def test_every_operator_of_onnx_computes_the_same(examples: list[TestCase], tmp_path: Path) -> None:
    """Emulated in fp16, by ONNX's reference implementation: within 1% of the largest value."""
    compared = 0
    for case in examples:
        model, data = case.model, case.data_sets
        assert model is not None  # all of these are models
        assert data is not None  # with inputs
        floats = any(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in model.graph.input)
        if case.name in _OTHERWISE or not floats or case.name.endswith("expanded"):
            continue
        onnx.save(model, tmp_path / "m.onnx")
        feeds = dict(zip((value.name for value in model.graph.input), data[0][0], strict=False))
        try:
            retype(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
            halves = emulated(tmp_path / "half.onnx")
            expected = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # noqa: S112 # refused, which the test above judges, or beyond the reference
            continue
        answers: list[Any] = list(ReferenceEvaluator(halves).run(None, feeds))
        for wide, half in zip(expected, answers, strict=True):
            if isinstance(wide, np.ndarray) and wide.dtype.kind in "biuf":
                exact = wide.astype(np.float64)
                largest = np.abs(exact[np.isfinite(exact)]).max(initial=1e-6) if wide.dtype.kind == "f" else 0.0
                np.testing.assert_allclose(half, wide, rtol=0, atol=1e-2 * largest, err_msg=case.name)
        compared += 1
    assert compared > 900
