"""Graphs that the real tensorrt_rtx cannot build, each told with its node and the way out."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_node, make_tensor_value_info

from tests.export.graphs import tensor, write
from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.building.complaints import way_out
from tnm_pipeline.export.errors import BuildFailed, BuildSettingError, ExportRejected
from tnm_pipeline.export.tensorrt import build_plan

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
BATCH = {"batch": (1, 8, 64), "sequence": (2, 32, 128)}


def unsupported(path: Path) -> Path:
    """`Det`, in a torch module."""
    nodes = [make_node("Relu", ["x"], ["positive"], "relu"), make_node("Det", ["positive"], ["y"], "node_det")]
    note = nodes[1].metadata_props.add()
    note.key, note.value = NAME_SCOPES, "['', 'body', 'body.flow', 'det']"
    return write(path, nodes, [tensor("x", "batch", 4, 4)], [tensor("y", "batch")])


def custom_domain(path: Path) -> Path:
    node = make_node("Fancy", ["x"], ["y"], "my_fancy", domain="my.company")
    return write(path, [node], [tensor("x", "batch", 4)], [tensor("y", "batch", 4)], domain="my.company")


def inferred_constant(path: Path) -> Path:
    """Reshaped to the batch of the sample."""
    size = numpy_helper.from_array(np.array([4, 8]), "size")
    node = make_node("Reshape", ["x", "size"], ["y"], "node_view")
    return write(path, [node], [tensor("x", "batch", 16)], [tensor("y", 4, 8)], weights=[size])


def added_constant(path: Path) -> Path:
    """A positional encoding as long as the sample."""
    encoding = numpy_helper.from_array(np.ones((4, 16), np.float32), "encoding")
    node = make_node("Add", ["x", "encoding"], ["y"], "node_add")
    return write(path, [node], [tensor("x", "batch", 16)], [tensor("y", "batch", 16)], weights=[encoding])


def new_opset(path: Path) -> Path:
    shape = ("batch", 2, "sequence", 16)
    node = make_node("Attention", ["q", "k", "v"], ["y"], "node_attention")
    return write(path, [node], [tensor(name, *shape) for name in "qkv"], [tensor("y", *shape)], opset=23)


def unsupported_branch(path: Path) -> Path:
    """`Det` in one branch of an `If`."""
    value = make_tensor_value_info("z", TensorProto.FLOAT, ["batch"])
    axes = numpy_helper.from_array(np.array([1, 2]), "axes")
    then_branch = make_graph([make_node("Det", ["x"], ["z"], "in_then_branch")], "then_branch", [], [value])
    summed = make_node("ReduceSum", ["x", "axes"], ["z"], "in_else_branch", keepdims=0)
    else_branch = make_graph([summed], "else_branch", [], [value])
    node = make_node("If", ["flag"], ["y"], "node_if", then_branch=then_branch, else_branch=else_branch)
    inputs = [tensor("x", "batch", 4, 4), tensor("flag", kind=TensorProto.BOOL)]
    return write(path, [node], inputs, [tensor("y", "batch")], weights=[axes])


def data_dependent(path: Path) -> Path:
    node = make_node("NonZero", ["x"], ["y"], "node_nonzero")
    return write(path, [node], [tensor("x", "batch", 4)], [tensor("y", 2, "count", kind=TensorProto.INT64)])


def shape_input(path: Path) -> Path:
    inputs = [tensor("x", "batch", 16), tensor("size", 2, kind=TensorProto.INT64)]
    return write(path, [make_node("Reshape", ["x", "size"], ["y"], "node_view")], inputs, [tensor("y", "a", "b")])


def double_input(path: Path) -> Path:
    kind = TensorProto.DOUBLE
    node = make_node("Relu", ["x"], ["y"], "relu")
    return write(path, [node], [tensor("x", "batch", 16, kind=kind)], [tensor("y", "batch", 16, kind=kind)])


def without_range(path: Path) -> Path:
    node = make_node("Relu", ["x"], ["y"], "relu")
    return write(path, [node], [tensor("x", "batch", "width")], [tensor("y", "batch", "width")])


@needs_rtx
@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (
            unsupported,
            BuildFailed,
            r"cannot read m\.onnx:\nnode node_det \(Det\), in torch module body\.flow: the builder does not support "
            r"the operator like this\. Write that part of the model without it, or run the ONNX file",
        ),
        (
            custom_domain,
            BuildFailed,
            r"node my_fancy \(Fancy\): the operator comes from the domain 'my\.company', and no plugin for it is",
        ),
        (
            inferred_constant,
            BuildFailed,
            r"(?s)for 8\.9: the builder gave up\n.*reshape would change volume.*\nnode node_view \(Reshape\)\n.*"
            "took a size of the sample data for a constant",
        ),
        (added_constant, BuildFailed, r"(?s)node node_add \(Add\)\n.*Export again with that dimension dynamic"),
        (
            new_opset,
            BuildFailed,
            r"(?s)node node_attention \(Attention\)\n.*no kernel.*export with opset 20 to 22",
        ),
        (unsupported_branch, BuildFailed, r"node in_then_branch \(Det\): the builder does not support"),
        (data_dependent, BuildFailed, r"node node_nonzero \(NonZero\): the builder does not support"),
        (shape_input, ExportRejected, "input 'size' is read as a shape.*Make it a constant"),
        (double_input, ExportRejected, "'x' is float64, which TensorRT does not have"),
        (without_range, BuildSettingError, "profile 0 says nothing of width"),
    ],
)
def test_what_cannot_be_built_is_told_with_the_way_out(
    graph: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = graph(tmp_path / "m.onnx")
    with pytest.raises(error, match=message):
        build_plan(
            path,
            tmp_path / "m.plan",
            sparse=True,
            precision="fp32",
            sparsity={},
            backend="tensorrt_rtx",
            profiles=[BATCH],
            compute_capabilities=("8.9",),
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


@needs_rtx
def test_scopes_that_are_no_list_are_left_out(tmp_path: Path) -> None:
    model = onnx.load(unsupported(tmp_path / "m.onnx"))
    for text in ("nonsense(", "7", "[7, 'x']"):
        model.graph.node[1].metadata_props[0].value = text
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(BuildFailed, match=r"node node_det \(Det\): the builder"):
            build_plan(tmp_path / "m.onnx", tmp_path / "m.plan", sparse=True, precision="fp32", sparsity={})


def test_an_unknown_complaint_has_no_way_out() -> None:
    assert not way_out("something new")


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = without_range(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"width", b"w\xffdth"))
    with pytest.raises(ExportRejected, match="has a name that is not UTF-8"):
        build_plan(path, tmp_path / "m.plan", sparse=True, precision="fp32", sparsity={})


def test_an_element_type_that_onnx_does_not_have(tmp_path: Path) -> None:
    node = make_node("Relu", ["x"], ["y"], "relu")
    path = write(tmp_path / "m.onnx", [node], [tensor("x", "batch", kind=77)], [tensor("y", "batch", kind=77)])
    with pytest.raises(ExportRejected, match="'x' has element type 77, which is none of a tensor"):
        build_plan(path, tmp_path / "m.plan", sparse=True, precision="fp32", sparsity={})
