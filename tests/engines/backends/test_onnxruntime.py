from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from tnm_pipeline.engines import (
    ArtifactRejected,
    EnvironmentLacks,
    FeedError,
    Manifest,
    RunFailed,
    TensorSpec,
    load,
    write_manifest,
)
from tnm_pipeline.engines.arrays import CudaArray, as_feed
from tnm_pipeline.engines.artifact import read_verified, sha256_of
from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend
from tnm_pipeline.engines.driver import Driver, Gpu, probe
from tnm_pipeline.engines.limits import Limits

NO_GPU = Driver(None, (), "no NVIDIA driver is installed")
ONE_GPU = Driver("13.0", (Gpu("NVIDIA L4", "8.9"),), None)

without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="here the CUDA provider starts")


def made(model: Path, device: str, driver: Driver) -> OnnxRuntimeBackend:
    content = read_verified(model)
    return OnnxRuntimeBackend(
        content.manifest, content.artifact, weights={}, device=device, driver=driver, limits=Limits()
    )


def seal(path: Path, like: Manifest, **changes: Any) -> None:
    values = {**{name: getattr(like, name) for name in like.__dataclass_fields__}, **changes}
    values.update(artifact=path.name, sha256=sha256_of(path), bytes=path.stat().st_size)
    write_manifest(path, Manifest(**values))


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_answers(model: Path, device: str) -> None:
    backend = made(model, device, NO_GPU)
    assert backend.device == "cpu"
    assert backend.run({"input": np.zeros((0, 8), np.float32)})["output"].shape == (0, 16)
    backend.close()


def test_demanding_cuda_without_a_driver_says_why(model: Path) -> None:
    with pytest.raises(EnvironmentLacks, match="needs a GPU: no NVIDIA driver is installed"):
        made(model, "cuda", NO_GPU)


@without_gpu
def test_demanding_cuda_never_ends_on_the_cpu(model: Path) -> None:
    """The probe is told of a GPU; ONNX Runtime then really fails to start its provider, or has none."""
    with pytest.raises(EnvironmentLacks, match="or pass device="):
        made(model, "cuda", ONE_GPU)


@without_gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this ONNX Runtime is a CPU build"
)
def test_a_provider_that_does_not_start_is_announced_and_the_cpu_answers(model: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"model\.fp32\.onnx runs on the CPU"):
        backend = made(model, "auto", ONE_GPU)
    assert backend.device == "cpu"
    assert backend.run({"input": np.zeros((2, 8), np.float32)})["output"].shape == (2, 16)


def test_sizes_that_the_network_cannot_take_name_the_artifact(model: Path, tmp_path: Path) -> None:
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["input", "shape"], ["pairs"]),
            helper.make_node("Flatten", ["pairs"], ["output"]),
        ],
        "pairs",
        [helper.make_tensor_value_info("input", kind, ["batch", 8])],
        [helper.make_tensor_value_info("output", kind, ["pairs", 16])],
        [helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [-1, 2, 8])],
    )
    path = tmp_path / "pairs.onnx"
    opset = helper.make_opsetid("", 20)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    seal(path, read_verified(model).manifest)
    with load(path, device="cpu") as session:
        with pytest.raises(
            RunFailed, match=r"pairs\.onnx fails on inputs of shapes \{'input': \(3, 8\)\} in ONNX Runtime"
        ):
            session.run({"input": np.zeros((3, 8), np.float32)})
        assert session.run({"input": np.zeros((4, 8), np.float32)})["output"].shape == (2, 16)


def test_weights_outside_the_file_are_refused_even_where_they_would_be_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = read_verified(model)
    outside = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load_from_string(content.artifact),
        outside,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    seal(outside, content.manifest)
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would look
    with pytest.raises(ArtifactRejected, match="with the weights inside"):
        load(outside, device="cpu")


def test_bytes_that_are_no_model_are_refused(model: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"not a model" * 100)
    seal(garbage, read_verified(model).manifest)
    with pytest.raises(ArtifactRejected, match="refuses it"):
        load(garbage, device="cpu")


def test_an_operator_that_is_not_implemented_is_the_environments_fault(model: Path, tmp_path: Path) -> None:
    kind = onnx.TensorProto.DOUBLE  # the CPU provider has Erf for float32 only
    graph = helper.make_graph(
        [helper.make_node("Erf", ["input"], ["output"])],
        "double_erf",
        [helper.make_tensor_value_info("input", kind, ["batch", 8])],
        [helper.make_tensor_value_info("output", kind, ["batch", 8])],
    )
    path = tmp_path / "erf.onnx"
    opset = helper.make_opsetid("", 20)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    seal(path, read_verified(model).manifest)
    with pytest.raises(EnvironmentLacks, match=r"lacks an operator of erf\.onnx"):
        load(path, device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": (TensorSpec("x", "float32", ("batch", 8), {}),)},
        {"inputs": (TensorSpec("input", "float16", ("batch", 8), {}),)},
        {"inputs": (TensorSpec("input", "float32", ("batch", 2, 4), {}),)},
        {"outputs": (TensorSpec("output", "int64", ("batch", 16), {}),)},
    ],
)
def test_a_manifest_of_other_tensors_is_refused(model: Path, changes: dict[str, Any]) -> None:
    seal(model, read_verified(model).manifest, **changes)
    with pytest.raises(ArtifactRejected, match=r"\(name, dtype, rank\) are .* its manifest states"):
        load(model, device="cpu")


def test_warm_up_runs_where_it_can_and_leaves_the_rest_cold(model: Path, tmp_path: Path) -> None:
    backend = made(model, "cpu", NO_GPU)
    backend.warm_up()
    assert backend.describe() == {"contexts": 2, "providers": ["CPUExecutionProvider"]}
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "shape"], ["output"])],
        "pairs",
        [helper.make_tensor_value_info("input", kind, ["batch", 8])],
        [helper.make_tensor_value_info("output", kind, ["pairs", 16])],
        [helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [-1, 16])],
    )
    path = tmp_path / "pairs.onnx"
    opset = helper.make_opsetid("", 20)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    seal(path, read_verified(model).manifest)
    odd = made(path, "cpu", NO_GPU)
    odd.warm_up()  # one row is half a pair
    assert odd.run({"input": np.zeros((2, 8), np.float32)})["output"].shape == (1, 16)


def test_warm_up_takes_the_usual_sizes_where_the_manifest_has_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_verified(model).manifest
    seal(model, manifest, inputs=(TensorSpec("input", "float32", ("batch", 8), {"batch": (1, 5, 9)}),))
    backend = made(model, "cpu", NO_GPU)
    seen: list[tuple[int, ...]] = []

    class Watched:
        def run(self, _: list[str], feeds: dict[str, Any], options: onnxruntime.RunOptions) -> None:
            seen.append(feeds["input"].shape)
            assert options.log_severity_level == 4  # sizes that do not suit are no news

    monkeypatch.setattr(backend, "_session", Watched())
    backend.warm_up()
    assert seen == [(5, 8)]


def test_arrays_of_a_gpu_are_refused_on_the_cpu(model: Path) -> None:
    backend = made(model, "cpu", NO_GPU)
    there = CudaArray(4096, (2, 8), np.dtype("float32"), None, None)
    with pytest.raises(FeedError, match=r"model\.fp32\.onnx runs on the CPU, and an input asks for a GPU"):
        backend.run({"input": there})
    with pytest.raises(FeedError, match="and on_device asks for a GPU"):
        backend.run({"input": np.zeros((2, 8), np.float32)}, on_device=True)
    assert backend.run({"input": np.zeros((2, 8), np.float32)})["output"].shape == (2, 16)


BOUND = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from tnm_pipeline.engines.arrays import CudaArray
from tnm_pipeline.engines.backends.onnxruntime_binding import DeviceRuns
session = onnxruntime.InferenceSession(Path(sys.argv[1]).read_bytes(), providers=["CPUExecutionProvider"])
given = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
expected = session.run(["output"], {"input": given})[0]
there = CudaArray(given.ctypes.data, given.shape, given.dtype, 1, given)
runs = DeviceRuns(session, ["output"], kind="cpu")
for feed in (there, given):
    answer = runs.run({"input": feed}, on_device=False)["output"]
    assert np.array_equal(answer, expected)
    kept = runs.run({"input": feed}, on_device=True)["output"]
    runs.run({"input": np.zeros((3, 8), np.float32)}, on_device=True)
    assert kept.shape == (3, 16) and np.array_equal(kept.numpy(), expected), "an output belongs to the caller"
del runs, session
assert np.array_equal(kept.numpy(), expected), "and outlives the session"
import ctypes
print(ctypes.CDLL("libcuda.so.1").host_driver_held())
"""


def test_bound_inputs_and_outputs_are_read_and_kept_where_they_are(
    model: Path, run_on_host_driver: Callable[..., str]
) -> None:
    """ONNX Runtime's own binding, on memory of the CPU. That its CUDA provider does the same, only a GPU can show."""
    assert run_on_host_driver(BOUND, model).strip() == "0"


@pytest.mark.gpu
def test_tensors_of_torch_are_read_on_the_gpu_and_outputs_stay_there(model: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    backend, reference = made(model, "cuda", probe()), made(model, "cpu", NO_GPU)
    given = torch.randn(3, 8, device="cuda")
    feeds = {"input": as_feed(read_verified(model).manifest.inputs[0], given)}
    expected = reference.run({"input": given.cpu().numpy()})["output"]
    answer = backend.run(feeds, on_device=True)["output"]
    # TF32 products: 10 bits of mantissa over sums of 8
    np.testing.assert_allclose(torch.as_tensor(answer, device="cuda").cpu().numpy(), expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(torch.from_dlpack(answer).cpu().numpy(), answer.numpy())
    np.testing.assert_allclose(backend.run(feeds)["output"], answer.numpy())
