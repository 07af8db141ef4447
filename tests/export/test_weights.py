"""Weights that cannot be counted: each is listed with a reason, or the file is refused with one. None is dropped."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_function, make_graph, make_model, make_node, make_opsetid, make_sparse_tensor, make_tensor

from tests.export.graphs import tensor, write
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.precision import retype
from tnm_pipeline.export.sparsity import SparsityReport, UnreadWeight, inspect_onnx

X, Y = tensor("x", "n", 4), tensor("y", "n", 4)
PRODUCT = make_node("MatMul", ["x", "w"], ["y"], "product")


def _weight(name: str, array: NDArray[Any] | None = None) -> TensorProto:
    return numpy_helper.from_array(np.eye(4, dtype=np.float32) if array is None else array, name)


def _one_unread(report: SparsityReport) -> UnreadWeight:
    assert report.layers == ()
    (weight,) = report.unread
    assert report.to_dict()["unread"] == [vars(weight)]
    return weight


def _save(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("operator", "inputs"), [("Mul", ["stored", "stored"]), ("Concat", ["half", "half"]), ("Relu", ["stored"])]
)
def test_a_constant_behind_another_operator_is_listed(operator: str, inputs: list[str], tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"axis": 0} if operator == "Concat" else {}
    nodes = [make_node(operator, inputs, ["w"], "between", **attributes), PRODUCT]
    weights = [_weight("stored"), _weight("half", np.ones((2, 4), np.float32))]
    weight = _one_unread(inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=weights)))
    assert (weight.name, weight.node, weight.op) == ("product", "product", "MatMul")
    assert f"{operator} node 'between'" in weight.why
    assert "--fold-constants" in weight.why


def test_what_is_made_at_run_time_is_no_weight(tmp_path: Path) -> None:
    nodes = [
        make_node("Mul", ["x", "stored"], ["moved"]),
        make_node("Transpose", ["moved"], ["turned"]),
        make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    report = inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=[_weight("stored")]))
    assert (report.layers, report.unread) == ((), ())


def test_a_shape_from_run_time_leaves_the_weight_unread(tmp_path: Path) -> None:
    nodes = [make_node("Reshape", ["stored", "shape"], ["w"], "reshape"), PRODUCT]
    inputs = [X, tensor("shape", 2, kind=TensorProto.INT64)]
    weight = _one_unread(inspect_onnx(write(tmp_path / "m.onnx", nodes, inputs, [Y], weights=[_weight("stored")])))
    assert "Reshape node 'reshape'" in weight.why
    assert "at run time" in weight.why


def test_a_tied_weight_is_counted_for_each_of_its_nodes(tmp_path: Path) -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "first"),
        make_node("Gemm", ["h", "w"], ["y"], "second", transB=1),
    ]
    stored = np.tile(np.array([1, 1, 0, 0], np.float32), (4, 1))
    layers = inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=[_weight("w", stored)])).layers
    assert [(layer.node, layer.eligible) for layer in layers] == [("first", False), ("second", True)]


@pytest.mark.parametrize("loop", ["Scan", "Loop"])
def test_weights_that_a_loop_hands_in_are_listed(loop: str, tmp_path: Path) -> None:
    product = make_node("MatMul", ["state", "slice"], ["next"], "inner")
    if loop == "Scan":
        body = make_graph([product], "body", [tensor("state", 4, 4), tensor("slice", 4, 4)], [tensor("next", 4, 4)])
        node = make_node("Scan", ["x", "stack"], ["y"], "steps", body=body, num_scan_inputs=1)
    else:
        counters = [tensor("turn", kind=TensorProto.INT64), tensor("go", kind=TensorProto.BOOL)]
        inputs = [*counters, tensor("state", 4, 4), tensor("slice", 4, 4)]
        same = [make_node("Identity", ["go"], ["still"]), make_node("Identity", ["slice"], ["again"])]
        outputs = [tensor("still", kind=TensorProto.BOOL), tensor("next", 4, 4), tensor("again", 4, 4)]
        node = make_node(
            "Loop",
            ["turns", "", "x", "stack"],
            ["y", "last"],
            "steps",
            body=make_graph([product, *same], "body", inputs, outputs),
        )
    stack = _weight("stack", np.ones((3, 4, 4) if loop == "Scan" else (4, 4), np.float32))
    weights = [stack, _weight("turns", np.array(3))]
    report = inspect_onnx(write(tmp_path / "m.onnx", [node], [tensor("x", 4, 4)], [tensor("y", 4, 4)], weights=weights))
    assert f"{loop} node 'steps' hands it in" in _one_unread(report).why


def test_products_that_are_not_counted_are_listed(tmp_path: Path) -> None:
    integers = [_weight("w", np.eye(4, dtype=np.int8))]
    inputs, outputs = [tensor("x", 1, 4, kind=TensorProto.INT8)], [tensor("y", 1, 4, kind=TensorProto.INT32)]
    node = make_node("MatMulInteger", ["x", "w"], ["y"], "quantised")
    weight = _one_unread(inspect_onnx(write(tmp_path / "m.onnx", [node], inputs, outputs, weights=integers)))
    assert (weight.name, weight.op) == ("w", "MatMulInteger")
    own = make_node("FusedMatMul", ["x", "w"], ["y"], "fused", domain="com.microsoft")
    path = write(tmp_path / "own.onnx", [own], [X], [Y], weights=[_weight("w")], domain="com.microsoft")
    assert _one_unread(inspect_onnx(path)).op == "com.microsoft::FusedMatMul"


def test_a_transposed_convolution_is_counted_and_not_eligible(tmp_path: Path) -> None:
    weight = np.zeros((4, 2, 1, 1), np.float32)  # (I, O, 1, 1)
    weight[:2] = 1
    node = make_node("ConvTranspose", ["x", "w"], ["y"])
    images = tensor("x", 1, 4, 2, 2), tensor("y", 1, 2, 2, 2)
    path = write(tmp_path / "m.onnx", [node], images[:1], images[1:], weights=[_weight("w", weight)])
    (layer,) = inspect_onnx(path).layers
    assert (layer.gemm_shape, layer.violations, layer.eligible) == ((2, 4), 0, False)
    assert layer.why.startswith("transposed convolution")


def test_vectors_and_empty_weights(tmp_path: Path) -> None:
    vector = inspect_onnx(
        write(tmp_path / "v.onnx", [PRODUCT], [X], [tensor("y", "n")], weights=[_weight("w", np.ones(4, np.float32))])
    )
    (layer,) = vector.layers
    assert (layer.gemm_shape, layer.why) == ((1, 4), "the weight is a vector")
    empty = inspect_onnx(
        write(tmp_path / "e.onnx", [PRODUCT], [X], [Y], weights=[_weight("w", np.ones((0, 4), np.float32))])
    )
    (layer,) = empty.layers
    assert (layer.gemm_shape, layer.density, layer.why) == ((4, 0), 0.0, "K = 0 is not a multiple of 4")


def test_strings_are_no_weights(tmp_path: Path) -> None:
    words = TensorProto(name="w", data_type=TensorProto.STRING, dims=[2, 2], string_data=[b"a", b"b", b"c", b"d"])
    assert "strings" in _one_unread(inspect_onnx(write(tmp_path / "m.onnx", [PRODUCT], [X], [Y], weights=[words]))).why


def test_sparse_initializers_are_refused(tmp_path: Path) -> None:
    values = make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    sparse = make_sparse_tensor(values, make_tensor("i", TensorProto.INT64, [1], [5]), [4, 4])
    graph = make_graph([PRODUCT], "graph", [X], [Y], sparse_initializer=[sparse])
    path = _save(make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ExportRejected, match=r"SparseTensorProto, first 'w'.* ordinary initializers"):
        inspect_onnx(path)


def _external(path: Path, location: str, length: int = 64) -> Path:
    stored = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        stored.external_data.add(key=key, value=value)
    return write(path, [PRODUCT], [X], [Y], weights=[stored])


def test_weights_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    (layer,) = inspect_onnx(_external(tmp_path / "m.onnx", "w.bin")).layers
    assert (layer.name, layer.density, layer.eligible) == ("w", 0.25, True)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "absent.bin", ""])
def test_weights_elsewhere_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    (tmp_path / "inner").mkdir()
    with pytest.raises(ExportRejected, match=r"outside the folder|not there"):
        inspect_onnx(_external(tmp_path / "inner" / "m.onnx", location))


def test_short_data_beside_the_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(60))
    with pytest.raises(ExportRejected, match="weight of MatMul node 'product'"):
        inspect_onnx(_external(tmp_path / "m.onnx", "w.bin"))


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A block size of 2^40 must not be taken at its word."""
    nodes = [make_node("DequantizeLinear", ["q", "scale"], ["w"], "dequantise", block_size=2**40, axis=0), PRODUCT]
    weights = [_weight("q", np.eye(4, dtype=np.int8)), _weight("scale", np.ones((2, 4), np.float32))]
    with pytest.raises(ExportRejected, match=r"MatMul node 'product'.* shape \(2, 4\)"):
        inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=weights, opset=21))


def test_scales_that_would_grow_a_weight_are_refused(tmp_path: Path) -> None:
    nodes = [make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1), PRODUCT]
    weights = [_weight("q", np.ones((50_000, 1), np.int8)), _weight("scale", np.ones(50_000, np.float32))]
    with pytest.raises(ExportRejected, match=r"shape \(50000,\)"):
        inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=weights))


def test_a_long_way_to_the_weight(tmp_path: Path) -> None:
    """Longer than Python can recurse."""
    steps = [make_node("Identity", [f"v{at}"], [f"v{at + 1}"]) for at in range(3000)]
    nodes = [*steps, make_node("MatMul", ["x", "v3000"], ["y"])]
    (layer,) = inspect_onnx(write(tmp_path / "m.onnx", nodes, [X], [Y], weights=[_weight("v0")])).layers
    assert layer.name == "v0"


def _with_functions(path: Path, bodies: dict[str, list[str]]) -> Path:
    """Functions of one input and output, each a chain of the operators or functions that it is made of."""
    imports = [make_opsetid("", 20), make_opsetid("own", 1)]
    functions = []
    for name, steps in bodies.items():
        chain = [
            make_node(step, [f"v{at}"], [f"v{at + 1}"], domain="own" if step in bodies else "")
            for at, step in enumerate(steps)
        ]
        functions.append(make_function("own", name, ["v0"], [f"v{len(steps)}"], chain, imports))
    call = make_node(next(iter(bodies)), ["x"], ["y"], domain="own")
    model = make_model(make_graph([call], "graph", [X], [Y]), opset_imports=imports, functions=functions, ir_version=10)
    return _save(model, path)


def test_functions_that_explode_or_go_round_are_refused(tmp_path: Path) -> None:
    doubling = {f"F{at}": [f"F{at + 1}"] * 2 for at in range(40)} | {"F40": ["Relu"]}
    with pytest.raises(ExportRejected, match=r"expand to 1099511627776 nodes"):
        inspect_onnx(_with_functions(tmp_path / "bomb.onnx", doubling))
    with pytest.raises(ExportRejected, match=r"(?i)circle|cycle"):
        inspect_onnx(_with_functions(tmp_path / "round.onnx", {"F": ["G"], "G": ["F"]}))


def test_newer_opsets_than_this_onnx_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [PRODUCT], [X], [Y], weights=[_weight("w")], opset=20)
    model = onnx.load(path)
    model.opset_import[0].version = 999
    (layer,) = inspect_onnx(_save(model, path)).layers
    assert layer.density == 0.25
    with pytest.raises(ExportRejected, match=r"of opset 999, .* an older opset"):
        retype(path, tmp_path / "half.onnx", "fp16")
