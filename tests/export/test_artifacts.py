from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.export.conftest import Exported
from tnm_pipeline.engines import verify_artifact, write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest, publish_onnx, read_onnx, tensor_specs
from tnm_pipeline.export.environment import package_versions
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.training.atomic import write_atomically


def _model(op: str) -> ir.Model:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node(op, ["input"], ["output"])], "graph", [value], [result])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_rejected_model_is_kept_aside_and_the_last_good_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    publish_onnx(_model("Relu"), path)
    good = path.read_bytes()
    with pytest.raises(ExportRejected, match=r"model\.onnx\.rejected"):
        publish_onnx(_model("NoSuchOperator"), path)
    assert path.read_bytes() == good
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.rejected"}
    publish_onnx(_model("Relu"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("content", [b"", b"not a protobuf", b"<html>404</html>", b"\x08\x0a\x12\x07pytorch"])
def test_file_that_is_not_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportRejected, match="not a readable ONNX file"):
        read_onnx(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportRejected, match="not a readable ONNX file"):
        read_onnx(tmp_path / "absent.onnx")


def test_manifest_describes_the_file(mlp: Exported) -> None:
    write_manifest(mlp.fp32, onnx_manifest(mlp.fp32, precision="fp32", sparsity={"layers": 2}))
    manifest = verify_artifact(mlp.fp32)
    assert manifest.inputs[0].shape == ("batch", 16)
    assert manifest.outputs[0].shape == ("batch", 10)
    assert manifest.inputs[0].dtype == "float32"
    assert manifest.provenance == {"packages": package_versions("tnm-pipeline", "torch", "onnx", "onnxscript")}
    known = onnx_manifest(mlp.fp32, precision="fp32", sparsity={}, provenance={"checkpoint_sha256": "0" * 64})
    assert known.provenance == {**manifest.provenance, "checkpoint_sha256": "0" * 64}


def test_a_plan_needs_a_range_of_every_dynamic_dimension() -> None:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "length"])
    assert tensor_specs([value])[0].shape == ("batch", "length")
    with pytest.raises(ExportRejected, match="'length'"):
        tensor_specs([value], [{"batch": (1, 2, 4)}])
    short, long = {"batch": (1, 2, 4), "length": (4, 6, 8)}, {"batch": (2, 8, 8), "length": (9, 9, 16)}
    (spec,) = tensor_specs([value], [short, long])
    assert spec.ranges == {"batch": (1, 2, 8), "length": (4, 6, 16)}
