"""Repositories read back with the classes of Triton's own client, whose parser decides what a configuration says."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]  # protobuf ships no types
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.export.conftest import Exported
from tnm_pipeline.engines import ArtifactRejected, load, verify_artifact
from tnm_pipeline.engines.artifact import sha256_of, write_manifest
from tnm_pipeline.engines.manifest import ExternalFile, Manifest, TensorSpec
from tnm_pipeline.engines.tensors import DTYPES
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.protobuf_text import to_text
from tnm_pipeline.export.triton import RepositoryError, _data_type, check_name, write_repository


def _model_config_pb2() -> ModuleType:
    """The generated file alone: importing its package asks for grpc and an older protobuf than onnx takes."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None, "tests need the tritonclient of the dev extra"
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pb: Any = _model_config_pb2()


def _parsed(text: str) -> Any:
    return text_format.Parse(text, pb.ModelConfig())


def _config(version: Path) -> Any:
    return _parsed((version.parent / "config.pbtxt").read_text(encoding="ascii"))


def _described(onnx_path: Path, precision: str = "fp32") -> Path:
    write_manifest(onnx_path, onnx_manifest(onnx_path, precision=precision, sparsity={}))
    return onnx_path


Signature = Mapping[str, tuple[int, list[str | int]]]  # name -> ONNX type, shape


def _graph(path: Path, inputs: Signature, outputs: Signature) -> Path:
    """A graph whose outputs are its inputs, in order, cast and left alone otherwise."""
    nodes = [
        helper.make_node("Cast", [source], [target], to=outputs[target][0])
        for source, target in zip(inputs, outputs, strict=True)
    ]
    before, after = (
        [helper.make_tensor_value_info(name, *spec) for name, spec in side.items()] for side in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "graph", before, after)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _plan(path: Path, inputs: Sequence[TensorSpec], profiles: Sequence[Any] = (), **changes: Any) -> Path:
    """A file with the manifest of a TensorRT plan. Its bytes are opaque to a repository."""
    path.write_bytes(b"plan")
    manifest = Manifest(
        artifact=path.name,
        sha256=sha256_of(path),
        bytes=4,
        backend="tensorrt",
        backend_version="11.0",
        precision="fp16",
        inputs=tuple(inputs),
        outputs=(TensorSpec("scores", "float32", ("batch", 10)),),
        source_onnx="../export/model.fp16.onnx",
        source_sha256="0" * 64,
        sparse_weights_flag=True,
        compute_capabilities=("9.0",),
        gpu="NVIDIA H200",
        driver="CUDA 13.0",
        sparsity={},
        profiles=tuple(profiles),
    )
    write_manifest(path, replace(manifest, **changes))
    return path


TOKENS = ("batch", "sequence")
SPANS = {"batch": (1, 8, 64), "sequence": (16, 64, 256)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_mlp(mlp: Exported, precision: str, tmp_path: Path) -> None:
    artifact = tmp_path / f"model.{precision}.onnx"
    shutil.copy(getattr(mlp, precision), artifact)
    version = write_repository(
        tmp_path / "models", "digits", _described(artifact, precision), preferred=(8, 16), max_delay_us=200, instances=2
    )
    assert version == tmp_path / "models/digits/1"
    assert _config(version) == pb.ModelConfig(
        name="digits",
        backend="onnxruntime",
        max_batch_size=64,
        input=[pb.ModelInput(name="input", data_type=pb.TYPE_FP32, dims=[16])],
        output=[pb.ModelOutput(name="output", data_type=pb.TYPE_FP32, dims=[10])],
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        instance_group=[pb.ModelInstanceGroup(count=2, kind=pb.ModelInstanceGroup.KIND_AUTO)],
        dynamic_batching=pb.ModelDynamicBatching(preferred_batch_size=[8, 16], max_queue_delay_microseconds=200),
        optimization=pb.ModelOptimizationPolicy(graph=pb.ModelOptimizationPolicy.Graph(level=1)),
        model_warmup=[_warmup(0, 1, input=(pb.TYPE_FP32, [16])), _warmup(1, 64, input=(pb.TYPE_FP32, [16]))],
    )
    inputs = np.ones((3, 16), np.float32)
    with load(version / "model.onnx") as served, load(artifact) as original:
        np.testing.assert_array_equal(
            served.run({"input": inputs})["output"], original.run({"input": inputs})["output"]
        )


def _warmup(index: int, batch: int, **inputs: tuple[int, list[int]]) -> Any:
    values = {
        name: pb.ModelWarmup.Input(data_type=dtype, dims=dims, zero_data=True) for name, (dtype, dims) in inputs.items()
    }
    return pb.ModelWarmup(name=f"warm-up {index}", batch_size=batch, inputs=values)


def test_several_inputs_and_outputs_with_two_dynamic_dimensions(tmp_path: Path) -> None:
    ids: tuple[int, list[str | int]] = (TensorProto.INT64, ["batch", "sequence"])
    scale: tuple[int, list[str | int]] = (TensorProto.FLOAT, ["batch"])
    flags: tuple[int, list[str | int]] = (TensorProto.FLOAT16, ["batch", "sequence"])
    path = _graph(
        tmp_path / "m.onnx",
        {"input_ids": ids, "mask": (TensorProto.BOOL, ["batch", "sequence"]), "scale": scale},
        {"hidden": flags, "kept": ids, "norm": scale},
    )
    config = _config(write_repository(tmp_path, "encoder", _described(path), max_batch=4, sizes={"sequence": 128}))
    assert list(config.input) == [
        pb.ModelInput(name="input_ids", data_type=pb.TYPE_INT64, dims=[-1]),
        pb.ModelInput(name="mask", data_type=pb.TYPE_BOOL, dims=[-1]),
        pb.ModelInput(name="scale", data_type=pb.TYPE_FP32, dims=[1], reshape=pb.ModelTensorReshape()),
    ]
    assert list(config.output) == [
        pb.ModelOutput(name="hidden", data_type=pb.TYPE_FP16, dims=[-1]),
        pb.ModelOutput(name="kept", data_type=pb.TYPE_INT64, dims=[-1]),
        pb.ModelOutput(name="norm", data_type=pb.TYPE_FP32, dims=[1], reshape=pb.ModelTensorReshape()),
    ]
    warm = {"input_ids": (pb.TYPE_INT64, [128]), "mask": (pb.TYPE_BOOL, [128]), "scale": (pb.TYPE_FP32, [1])}
    assert list(config.model_warmup) == [_warmup(0, 1, **warm), _warmup(1, 4, **warm)]
    assert config.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["batch", 4], [4]),  # an output without the batch
        (["batch", 4], ["rows", 4]),  # two different dimensions
        ([2, 4], [2, 4]),  # fixed
        (["batch", 4], []),  # a scalar
    ],
)
def test_without_a_common_batch_requests_carry_every_dimension(
    first: list[str | int], second: list[str | int], tmp_path: Path
) -> None:
    specs = {"a": (TensorProto.FLOAT, first), "b": (TensorProto.FLOAT, second)}
    path = _described(_graph(tmp_path / "m.onnx", specs, {f"{name}_out": spec for name, spec in specs.items()}))
    config = _config(write_repository(tmp_path, "model", path, sizes={"batch": 3}))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    dims = [[-1 if isinstance(size, str) else size for size in shape] or [1] for shape in (first, second)]
    assert [list(tensor.dims) for tensor in config.input] == dims
    assert [tensor.HasField("reshape") for tensor in config.input] == [False, not second]
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1
    real = [[{"batch": 3, "rows": 1}.get(str(size), size) for size in shape] or [1] for shape in (first, second)]
    assert [list(warmup.inputs[name].dims) for name in ("a", "b")] == real
    with pytest.raises(RepositoryError, match="share no batch of 1: leave it out"):
        write_repository(tmp_path, "other", path, max_batch=8)


def test_plan_with_profiles(tmp_path: Path) -> None:
    small = {"batch": (1, 4, 8), "sequence": (128, 128, 256)}
    large = {"batch": (1, 32, 64), "sequence": (16, 16, 32)}
    spec = TensorSpec("ids", "int64", TOKENS, {"batch": (1, 4, 64), "sequence": (16, 128, 256)})
    version = write_repository(tmp_path / "models", "bert", _plan(tmp_path / "m.plan", [spec], [small, large]))
    config = _config(version)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 64)
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (pb.ModelInstanceGroup.KIND_GPU, ["0", "1"])
    ids = pb.TYPE_INT64
    assert list(config.model_warmup) == [_warmup(0, 4, ids=(ids, [128])), _warmup(1, 32, ids=(ids, [16]))]
    assert not config.HasField("optimization")
    manifest = verify_artifact(version / "model.plan")
    assert manifest.source_onnx is None
    assert manifest.profiles == (small, large)


def test_plan_that_takes_no_single_request_is_not_batched(tmp_path: Path) -> None:
    spans = {**SPANS, "batch": (8, 8, 64)}
    path = _plan(tmp_path / "m.plan", [TensorSpec("ids", "int64", TOKENS, spans)], [spans])
    config = _config(write_repository(tmp_path, "model", path))
    assert config.max_batch_size == 0
    assert list(config.model_warmup) == [_warmup(0, 1, ids=(pb.TYPE_INT64, [8, 64]))]
    assert list(config.input[0].dims) == [-1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 65}, "max_batch is 65, and the model ends at 64"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"preferred": (8, 128)}, r"\[8, 128\] must be between 1 and max_batch = 64"),
        ({"max_delay_us": -1}, "not negative"),
        ({"instances": 0}, "instances is 0"),
        ({"name": "../model"}, r"'../model' cannot be a model's name"),
        ({"name": ".hidden"}, "no '.' first"),
        ({"name": ""}, "cannot be a model's name"),
    ],
)
def test_refused_settings(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _plan(tmp_path / "m.plan", [TensorSpec("ids", "int64", TOKENS, SPANS)], [SPANS])
    with pytest.raises(RepositoryError, match=message):
        write_repository(tmp_path / "models", **{"name": "model", "artifact": path, **arguments})
    assert not (tmp_path / "models").exists()


def test_plan_for_rtx_is_refused_and_its_onnx_named(tmp_path: Path) -> None:
    path = _plan(tmp_path / "m.plan", [TensorSpec("ids", "int64", TOKENS, SPANS)], [SPANS], backend="tensorrt_rtx")
    with pytest.raises(ExportRejected, match=r"give the ONNX file that it was built from, .*model\.fp16\.onnx, or"):
        write_repository(tmp_path / "models", "model", path)


def test_strings_are_refused_before_there_is_a_manifest(tmp_path: Path) -> None:
    path = _graph(tmp_path / "m.onnx", {"a": (TensorProto.STRING, ["n"])}, {"b": (TensorProto.STRING, ["n"])})
    with pytest.raises(ArtifactRejected, match="'a' has dtype"):
        onnx_manifest(path, precision="fp32", sparsity={})


def test_versions_are_added_and_never_changed(mlp: Exported, tmp_path: Path) -> None:
    first = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    second = _described(Path(shutil.copy(mlp.fp16, tmp_path / "b.onnx")), "fp16")
    models = tmp_path / "models"
    assert write_repository(models, "model", first).name == "1"
    assert write_repository(models, "model", first).name == "1"  # the same file again
    (models / "model/07").mkdir()  # Triton ignores what begins with a zero
    assert write_repository(models, "model", second).name == "2"
    assert write_repository(models, "model", first).name == "3"  # back to the first
    (models / "model/3/model.onnx").write_bytes(b"damaged")
    assert write_repository(models, "model", first).name == "4"
    assert (models / "model/1/model.onnx").read_bytes() == first.read_bytes()
    assert (models / "model/3/model.onnx").read_bytes() == b"damaged"
    assert sorted(path.name for path in (models / "model").iterdir()) == ["07", "1", "2", "3", "4", "config.pbtxt"]


def test_a_version_that_needs_another_configuration_is_refused(mlp: Exported, tmp_path: Path) -> None:
    path = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    write_repository(tmp_path, "model", path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RepositoryError, match="line 3 is 'max_batch_size: 64', it would be 'max_batch_size: 8'"):
        write_repository(tmp_path, "model", path, max_batch=8)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_artifact_that_was_changed_is_not_copied(mlp: Exported, tmp_path: Path) -> None:
    path = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactRejected, match="sha256"):
        write_repository(tmp_path / "models", "model", path)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_what_another_process_adds_meanwhile_stays(
    fails: bool, mlp: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins once the first has decided that the model is new, and is done before it has a version."""
    first = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    second = _described(Path(shutil.copy(mlp.fp16, tmp_path / "b.onnx")), "fp16")
    models = tmp_path / "models"
    copy = shutil.copyfile

    def slow(source: Path, target: Path) -> None:
        monkeypatch.setattr(shutil, "copyfile", copy)
        assert write_repository(models, "model", second) == models / "model/1"
        if fails:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", slow)
    if fails:
        with pytest.raises(OSError, match="No space left"):
            write_repository(models, "model", first)
    else:
        assert write_repository(models, "model", first) == models / "model/2"
        assert (models / "model/2/model.onnx").read_bytes() == first.read_bytes()
    assert (models / "model/1/model.onnx").read_bytes() == second.read_bytes()
    expected = ["1", "config.pbtxt"] if fails else ["1", "2", "config.pbtxt"]
    assert sorted(path.name for path in (models / "model").iterdir()) == expected


def test_a_number_that_is_taken_at_the_last_moment(
    mlp: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    rename = Path.rename

    def late(draft: Path, version: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        version.mkdir()
        (version / "model.onnx").write_bytes(b"another's")
        return rename(draft, version)

    monkeypatch.setattr(Path, "rename", late)
    assert write_repository(tmp_path, "model", path) == tmp_path / "model/2"
    assert (tmp_path / "model/1/model.onnx").read_bytes() == b"another's"


def test_names_can_be_checked_before_there_is_a_model() -> None:
    check_name("digits-2.4_T")
    with pytest.raises(RepositoryError, match="'a/b' cannot be a model's name"):
        check_name("a/b")


@pytest.mark.parametrize("versions", [0, 1])
def test_what_fails_leaves_the_repository_as_it_was(
    versions: int, mlp: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _described(Path(shutil.copy(mlp.fp32, tmp_path / "a.onnx")))
    second = _described(Path(shutil.copy(mlp.fp16, tmp_path / "b.onnx")), "fp16")
    models = tmp_path / "models"
    models.mkdir()
    if versions:
        write_repository(models, "model", first)
    before = sorted(models.rglob("*"))

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        write_repository(models, "model", second)
    assert sorted(models.rglob("*")) == before


def test_external_weights_come_along(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(512, dtype=np.float32).reshape(8, 64), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    onnx.save(model, path, save_as_external_data=True, location=data.name)
    manifest = onnx_manifest(path, precision="fp32", sparsity={})
    external = (ExternalFile(data.name, sha256_of(data), data.stat().st_size),)
    write_manifest(path, replace(manifest, external=external))
    version = write_repository(tmp_path / "models", "model", path)
    data.unlink()
    with load(version / "model.onnx") as session:
        assert session.run({"x": np.ones((1, 8), np.float32)})["y"][0, 0] == np.arange(0, 512, 64).sum()


@given(st.text())
def test_any_string_survives_the_text_form(text: str) -> None:
    assert _parsed(to_text({"name": text})).name == text


def test_data_types_are_those_that_triton_knows() -> None:
    names = {_data_type(TensorSpec("x", dtype, (2,))) for dtype in DTYPES}
    assert len(names) == len(DTYPES)
    assert names <= set(pb.DataType.keys())
