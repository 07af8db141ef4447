"""A tiny network as real artifacts: an ONNX file, and a TensorRT-RTX plan of it built ahead of time without a GPU.

Also a process whose `libcuda.so.1` is `host_driver.c`: no GPU, and every call really made.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tnm_pipeline.engines.artifact import sha256_of, write_manifest
from tnm_pipeline.engines.manifest import Manifest, TensorSpec

Run = Callable[..., str]

IN_FEATURES, OUT_FEATURES = 8, 16
BUILT_FOR = ("8.0", "8.9")


def _write_onnx(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((OUT_FEATURES, IN_FEATURES)).astype(np.float32)
    bias = rng.standard_normal(OUT_FEATURES).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["input", "weight", "bias"], ["sum"], transB=1),
            helper.make_node("Relu", ["sum"], ["output"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", IN_FEATURES])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", OUT_FEATURES])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    write_manifest(path, _facts(path))
    return path


def _published(
    path: Path, graph: onnx.GraphProto, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Path:
    opset = helper.make_opsetid("", 20)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    write_manifest(path, _facts(path, inputs=inputs, outputs=outputs))
    return path


def _facts(path: Path, **changes: Any) -> Manifest:
    """The manifest of the ONNX file at `path`, with `changes`."""
    values: dict[str, Any] = {
        "artifact": path.name,
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "backend": "onnxruntime",
        "backend_version": onnx.__version__,
        "precision": "fp32",
        "inputs": (TensorSpec("input", "float32", ("batch", IN_FEATURES), {}),),
        "outputs": (TensorSpec("output", "float32", ("batch", OUT_FEATURES), {}),),
        "source_onnx": None,
        "source_sha256": None,
        "sparse_weights_flag": None,
        "compute_capabilities": (),
        "gpu": None,
        "driver": None,
        "sparsity": {"layers": 1, "eligible": 0, "violations": 32, "violations_transposed": 32, "pattern": "2:4"},
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX artifact in its own folder, as a run lays it out."""
    folder = tmp_path / "export"
    folder.mkdir()
    return _write_onnx(folder / "model.fp32.onnx", seed=0)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """Another valid ONNX artifact of the same name, with the same inputs and other weights."""
    folder = tmp_path / "other"
    folder.mkdir()
    return _write_onnx(folder / "model.fp32.onnx", seed=1)


@pytest.fixture
def patient_model(tmp_path: Path) -> Path:
    """`output = input + 1`, after as many rounds of work as the input `rounds` says: 100,000 take some 0.1 s."""
    kind, number = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Tanh", ["state"], ["next"])],
        "round",
        [
            helper.make_tensor_value_info("index", number, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", kind, [1]),
        ],
        [
            helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", kind, [1]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["rounds", "", "zero"], ["spent"], body=body),
            helper.make_node("Add", ["input", "one"], ["more"]),
            helper.make_node("Add", ["more", "spent"], ["output"]),
        ],
        "patient",
        [
            helper.make_tensor_value_info("input", kind, ["batch"]),
            helper.make_tensor_value_info("rounds", number, []),
        ],
        [helper.make_tensor_value_info("output", kind, ["batch"])],
        [helper.make_tensor("zero", kind, [1], [0.0]), helper.make_tensor("one", kind, [1], [1.0])],
    )
    inputs = (TensorSpec("input", "float32", ("batch",)), TensorSpec("rounds", "int64", ()))
    outputs = (TensorSpec("output", "float32", ("batch",)),)
    return _published(tmp_path / "patient.onnx", graph, inputs, outputs)


@pytest.fixture
def lookup_model(tmp_path: Path) -> Path:
    """`output[i]` is row `ids[i]` of a table of ten rows; ONNX Runtime fails on other ids."""
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["output"])],
        "lookup",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(table, "table")],
    )
    outputs = (TensorSpec("output", "float32", ("batch", 2)),)
    return _published(tmp_path / "lookup.onnx", graph, (TensorSpec("ids", "int64", ("batch",)),), outputs)


@pytest.fixture(scope="session")
def plan_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real TensorRT-RTX plan of the seed-0 network for `BUILT_FOR`."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    source = _write_onnx(tmp_path_factory.mktemp("plan") / "model.fp32.onnx", seed=0)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(source.read_bytes()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(BUILT_FOR)
    for index, capability in enumerate(BUILT_FOR):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, IN_FEATURES), (4, IN_FEATURES), (8, IN_FEATURES))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.fixture
def plan(plan_bytes: bytes, model: Path, tmp_path: Path, seal_plan: Callable[..., Path]) -> Path:
    """That plan as an artifact whose manifest names `model` as its source."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    path = tmp_path / "build" / "model.fp16.plan"
    path.parent.mkdir()
    path.write_bytes(plan_bytes)
    seal_plan(path, model, backend="tensorrt_rtx", backend_version=trt.__version__)
    return path


@pytest.fixture
def seal_plan() -> Callable[..., Path]:
    """`seal_plan(path, source, **changes)` writes the manifest of a plan built from `source`, with `changes`."""

    def seal(path: Path, source: Path, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "inputs": (TensorSpec("input", "float32", ("batch", IN_FEATURES), {"batch": (1, 4, 8)}),),
            "source_onnx": f"../{source.parent.name}/{source.name}",
            "source_sha256": sha256_of(source),
            "sparse_weights_flag": True,
            "compute_capabilities": BUILT_FOR,
        }
        return write_manifest(path, _facts(path, **{**values, **changes}))

    return seal


@pytest.fixture
def stand_in() -> str:
    """What PYTHONPATH needs for `import tensorrt` and `import tensorrt_rtx` to find the stand-ins."""
    return str(Path(__file__).with_name("stand_in"))


@pytest.fixture
def doubler(tmp_path: Path, model: Path, seal_plan: Callable[..., Path]) -> Callable[..., Path]:
    """`doubler(content, **changes)`: an artifact for the stand-in, with its manifest."""

    def write(content: bytes = b"a plan", **changes: Any) -> Path:
        path = tmp_path / "build" / "model.plan"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        values = {
            "backend": "tensorrt",
            "backend_version": "10.13.0.35",
            "compute_capabilities": ("8.9",),
            "outputs": (TensorSpec("output", "float32", ("batch", 8), {}),),
        }
        seal_plan(path, model, **{**values, **changes})
        return path

    return write


@pytest.fixture(scope="session")
def host_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the compiled stand-in driver."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the stand-in CUDA driver needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("host_driver.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-pthread", "-Wall", "-Werror", source, "-o", folder / "libcuda.so.1"],
        check=True,
    )
    return folder


@pytest.fixture
def run_on_host_driver(host_driver: Path) -> Run:
    """`run(code, *arguments, **environment)`: stdout of a fresh Python that finds the stand-in driver first."""

    def run(code: str, *arguments: object, **environment: str) -> str:
        settings = {"HOST_DRIVER_CAPABILITY": "8.9", "LD_LIBRARY_PATH": str(host_driver), **environment}
        if "PYTHONPATH" in environment and "PYTHONPATH" in os.environ:
            settings["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], os.environ["PYTHONPATH"]])
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
