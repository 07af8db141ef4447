"""The half types against numpy's and torch's own rounding, on exported models and on graphs written node by node."""

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import GraphProto, TensorProto, numpy_helper
from onnx.helper import make_node

from tests.export.conftest import Exported, run_onnx
from tests.export.graphs import tensor, write
from tests.export.half_graphs import KINDS, Array, computes, constant, operators, retyped, run
from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.precision import Half, emulated


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
    for name, weight in before.items():
        if weight.data_type == TensorProto.FLOAT:
            assert after[name].data_type == TensorProto.FLOAT16, name
            zeros, still = numpy_helper.to_array(weight) == 0, numpy_helper.to_array(after[name]) == 0
            np.testing.assert_array_equal(zeros, still)


@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_casts_are_at_the_edges_alone_and_nodes_keep_their_names(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    before, after = onnx.load(exported.fp32).graph, onnx.load(exported.fp16).graph
    assert operators(after) == operators(before) + Counter(Cast=2)

    def scopes(graph: GraphProto) -> dict[str, list[str]]:
        found = {node.name: [p.value for p in node.metadata_props if p.key == NAME_SCOPES] for node in graph.node}
        return {node: values for node, values in found.items() if values}

    assert scopes(after) == scopes(before) != {}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_values_are_rounded_to_nearest_and_never_to_zero(precision: Half, tmp_path: Path) -> None:
    smallest = 2.0**-24 if precision == "fp16" else 2.0**-133
    values = np.array([0, -0.0, 1 / 3, -1e-3, smallest / 8, -smallest / 8, smallest, np.inf, -np.inf], np.float32)
    node = make_node("Mul", ["x", "w"], ["y"])
    source = write(
        tmp_path / "m.onnx", [node], [tensor("x", 9)], [tensor("y", 9)], weights=[constant(values, "w")], opset=22
    )
    (weight,) = (t for t in retyped(source, precision).graph.initializer if t.name == "w")
    rounded = torch.from_numpy(values).to(torch.float16 if precision == "fp16" else torch.bfloat16).double().numpy()
    rounded[4:6] = smallest, -smallest
    assert weight.data_type == KINDS[precision]
    np.testing.assert_array_equal(numpy_helper.to_array(weight).astype(np.float64), rounded)


@pytest.mark.parametrize("as_node", [False, True])
def test_overflow_is_refused_by_name(as_node: bool, tmp_path: Path) -> None:
    large = constant(np.array([1.0, -7e4], np.float32), "layer.scale")
    nodes = [make_node("Mul", ["x", "layer.scale"], ["y"], "scaling")]
    if as_node:
        nodes.insert(0, make_node("Constant", [], ["layer.scale"], value=large))
    weights = [] if as_node else [large]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", "n", 2)], [tensor("y", "n", 2)], weights=weights)
    with pytest.raises(ExportRejected, match=r"'layer\.scale' holds 70000 and fp16 ends at 65504: keep .*'scaling'"):
        retyped(source)
    assert not (tmp_path / "retyped.fp16.onnx").exists()
    kept = retyped(source, keep=["scaling"])
    np.testing.assert_array_equal(run(kept, x=np.ones((1, 2), np.float32)), [[1, -7e4]])


@pytest.mark.parametrize("lowest", [-1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_mask_is_clipped_and_infinity_is_not(precision: Half, lowest: float, tmp_path: Path) -> None:
    low = constant(np.array([[0, lowest]], np.float32), "low")
    infinite = constant(np.array([[0, -np.inf]], np.float32), "infinite")
    nodes = [make_node("Add", ["x", "low"], ["masked"]), make_node("Add", ["masked", "infinite"], ["y"])]
    source = write(
        tmp_path / "m.onnx", nodes, [tensor("x", 1, 2)], [tensor("y", 1, 2)], weights=[low, infinite], opset=22
    )
    found = {t.name: numpy_helper.to_array(t) for t in retyped(source, precision).graph.initializer}
    dtype = found["low"].dtype
    fits = precision == "bf16" and lowest == -1e9
    expected = np.float32(lowest).astype(ml_dtypes.bfloat16) if fits else ml_dtypes.finfo(dtype).min  # type: ignore[no-untyped-call]
    assert found["low"].tolist() == [[0, expected]]
    assert found["infinite"].tolist() == [[0, -np.inf]]


def test_a_mask_that_is_filled_in_is_clipped(tmp_path: Path) -> None:
    low = constant(np.array([-1e9], np.float32), "low")
    nodes = [make_node("ConstantOfShape", ["shape"], ["mask"], value=low), make_node("Add", ["x", "mask"], ["y"])]
    inputs = [tensor("x", 2), tensor("shape", 1, kind=TensorProto.INT64)]
    model = retyped(write(tmp_path / "m.onnx", nodes, inputs, [tensor("y", 2)]))
    (filling,) = (node.attribute[0].t for node in model.graph.node if node.op_type == "ConstantOfShape")
    assert numpy_helper.to_array(filling) == np.float16(-65504)


def test_a_mask_made_from_integers_hides_what_it_should(tmp_path: Path) -> None:
    """(1 - mask) * lowest, the way of older encoders: in fp16 the product would be infinite, and NaN where it is 0."""
    nodes = [
        make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        make_node("Sub", ["one", "kept"], ["hidden"]),
        make_node("Mul", ["hidden", "lowest"], ["bias"]),
        make_node("Add", ["x", "bias"], ["scores"]),
        make_node("Softmax", ["scores"], ["y"]),
    ]
    weights = [
        constant(np.array(1, np.float32), "one"),
        constant(np.array(np.finfo(np.float32).min, np.float32), "lowest"),
    ]
    inputs = [tensor("x", 2, 3), tensor("mask", 2, 3, kind=TensorProto.INT64)]
    source = write(tmp_path / "m.onnx", nodes, inputs, [tensor("y", 2, 3)], weights=weights)
    feeds = {"x": np.zeros((2, 3), np.float32), "mask": np.array([[1, 1, 0], [0, 0, 0]])}
    retyped(source)
    shares = run(emulated(tmp_path / "retyped.fp16.onnx"), **feeds)
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0], [1 / 3] * 3], atol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_positions_beyond_the_integers_of_the_type_stay_exact(precision: Half, tmp_path: Path) -> None:
    """bf16 has no integers above 256 that are odd: a sinus of such positions would be noise."""
    nodes = [
        make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        make_node("Mul", ["floats", "frequency"], ["angles"]),
        make_node("Sin", ["angles"], ["waves"]),
        make_node("Mul", ["waves", "x"], ["y"], "use"),
    ]
    weights = [constant(np.array(0.5, np.float32), "frequency")]
    inputs = [tensor("positions", 4, kind=TensorProto.INT64), tensor("x", 4)]
    source = write(tmp_path / "m.onnx", nodes, inputs, [tensor("y", 4)], weights=weights, opset=22)
    positions = np.array([3, 1001, 2049, 4097])
    model = retyped(source, precision)
    assert computes(model, "use") == KINDS[precision]
    waves = run(emulated(tmp_path / f"retyped.{precision}.onnx"), positions=positions, x=np.ones(4, np.float32))
    np.testing.assert_allclose(waves, np.sin(positions * 0.5), atol=4e-3)


def test_images_in_integers_do_not_keep_a_network_in_float32(tmp_path: Path) -> None:
    nodes = [
        make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        make_node("Mul", ["floats", "scale"], ["scaled"], "scaling"),
        make_node("Conv", ["scaled", "w"], ["features"], "conv"),
        make_node("Relu", ["features"], ["y"], "relu"),
    ]
    weights = [constant(np.array(1 / 255, np.float32), "scale"), constant(np.ones((2, 3, 1, 1), np.float32), "w")]
    inputs = [tensor("pixels", 1, 3, 4, 4, kind=TensorProto.UINT8)]
    model = retyped(write(tmp_path / "m.onnx", nodes, inputs, [tensor("y", 1, 2, 4, 4)], weights=weights))
    assert [computes(model, name) for name in ("scaling", "conv", "relu")] == [1, 10, 10]


def test_what_the_schema_keeps_in_float32_stays_and_shares_its_constant(tmp_path: Path) -> None:
    """`Resize` takes its scales in float32 alone, and `CumSum` adds up in it; both use what a half node uses."""
    nodes = [
        make_node("Resize", ["x", "", "scales"], ["large"], "resize"),
        make_node("Mul", ["large", "scales"], ["scaled"], "multiply"),
        make_node("CumSum", ["scaled", "axis"], ["summed"], "sum"),
        make_node("Mul", ["summed", "scales"], ["y"], "again"),
    ]
    weights = [constant(np.array([1, 2], np.float32), "scales"), constant(np.array(1), "axis")]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 3, 1)], [tensor("y", 3, 2)], weights=weights)
    model = retyped(source)
    assert [computes(model, name) for name in ("resize", "multiply", "sum", "again")] == [10, 10, 1, 10]
    assert {t.name: t.data_type for t in model.graph.initializer} == {"scales": 10, "scales_fp32": 1, "axis": 7}
    x = np.array([[1], [2], [3]], np.float32)
    np.testing.assert_array_equal(run(model, x=x), run(source, x=x))


def test_kept_nodes_stay_between_casts(tmp_path: Path) -> None:
    nodes = [
        make_node("Exp", ["x"], ["a"], "first"),
        make_node("Exp", ["a"], ["b"], "second"),
        make_node("Neg", ["b"], ["y"]),
    ]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 2)], [tensor("y", 2)])
    model = retyped(source, keep=["second"])
    assert [computes(model, name) for name in ("first", "second")] == [10, 1]
    x = np.array([1.0, 2.0], np.float32)
    once = np.exp(x.astype(np.float16)).astype(np.float32)
    answers = run(emulated(tmp_path / "retyped.fp16.onnx"), x=x)
    np.testing.assert_array_equal(answers, -np.exp(once).astype(np.float16).astype(np.float32))
    with pytest.raises(ExportRejected, match=r"called 'secnod'; there is second"):
        retyped(source, keep=["secnod"])


def test_casts_that_have_become_idle_are_gone(tmp_path: Path) -> None:
    """A graph that had half parts already: its casts to and from them meet the new type."""
    nodes = [
        make_node("Cast", ["x"], ["low"], to=TensorProto.FLOAT16),
        make_node("Relu", ["low"], ["rectified"]),
        make_node("Cast", ["rectified"], ["high"], to=TensorProto.FLOAT),
        make_node("Neg", ["high"], ["y"]),
    ]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 3)], [tensor("y", 3)])
    assert operators(retyped(source).graph) == {"Cast": 2, "Relu": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("precision", "dtype", "step"), [("fp16", torch.float16, 2.0**-10), ("bf16", torch.bfloat16, 2.0**-7)]
)
def test_emulation_rounds_like_torch(precision: Half, dtype: torch.dtype, step: float, tmp_path: Path) -> None:
    """Every step in float32, then rounded: which is how a half product with a wide accumulator comes out."""
    generator = np.random.default_rng(0)
    w1, w2 = (generator.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    nodes = [
        make_node("MatMul", ["x", "w1"], ["a"]),
        make_node("Relu", ["a"], ["b"]),
        make_node("MatMul", ["b", "w2"], ["y"]),
    ]
    weights = [constant(w1, "w1"), constant(w2, "w2")]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", 4, 32)], [tensor("y", 4, 32)], weights=weights, opset=22)
    retyped(source, precision)
    x = generator.standard_normal((4, 32)).astype(np.float32)
    answers = run(emulated(tmp_path / f"retyped.{precision}.onnx"), x=x)

    def rounded(array: Array) -> Array:
        return torch.from_numpy(array).to(dtype).float().numpy()

    expected = rounded(np.maximum(rounded(rounded(x) @ rounded(w1)), 0) @ rounded(w2))
    np.testing.assert_array_equal(answers, rounded(answers))
    np.testing.assert_allclose(
        answers, expected, rtol=step, atol=step * np.abs(expected).max()
    )  # sums in another order
    assert np.mean(answers == expected) > 0.9


def test_emulation_is_of_graphs_with_float32_outside(tmp_path: Path) -> None:
    half = tensor("x", 2, kind=TensorProto.FLOAT16), tensor("y", 2, kind=TensorProto.FLOAT16)
    source = write(tmp_path / "m.onnx", [make_node("Relu", ["x"], ["y"])], half[:1], half[1:])
    with pytest.raises(ExportRejected, match="'x' in half"):
        emulated(source)
