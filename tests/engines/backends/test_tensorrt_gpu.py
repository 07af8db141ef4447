"""TensorRT and TensorRT-RTX on a real GPU: what the stand-ins cannot show. Run with `pytest -m gpu`."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tnm_pipeline.engines import Limits, load
from tnm_pipeline.engines.arrays import as_feed
from tnm_pipeline.engines.artifact import read_verified
from tnm_pipeline.engines.backends.tensorrt import TensorRTBackend
from tnm_pipeline.engines.driver import probe

pytestmark = pytest.mark.gpu

Made = Callable[..., TensorRTBackend]
RANGE = (1, 4, 8)
# TF32 products: 10 bits of mantissa over sums of 8
RELATIVE = 2e-2


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def plan(
    request: pytest.FixtureRequest,
    model: Path,
    tmp_path: Path,
    seal_plan: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A plan of `model` for this GPU, built here. Its compiled kernels are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trt: Any = pytest.importorskip(request.param)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.read_bytes())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((rows, 8) for rows in RANGE))
    config.add_optimization_profile(profile)
    path = tmp_path / "build" / "model.plan"
    path.parent.mkdir()
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    here = probe().gpus[0]
    seal_plan(
        path,
        model,
        backend=request.param,
        backend_version=trt.__version__,
        compute_capabilities=(here.compute_capability,),
        gpu=here.name,
        profiles=({"batch": RANGE},),
    )
    return path


@pytest.fixture
def made(plan: Path) -> Iterator[Made]:
    """`made(**limits)` is the backend of `plan`, closed at the end."""
    backends = []

    def make(**limits: Any) -> TensorRTBackend:
        content = read_verified(plan)
        backend = TensorRTBackend(content.manifest, content.artifact, driver=probe(), limits=Limits(**limits))
        backends.append(backend)
        return backend

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def expected(model: Path) -> Iterator[Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]]:
    """What ONNX Runtime answers on the CPU."""
    with load(model, device="cpu") as session:
        yield lambda given: session.run({"input": given})["output"]


def rows_of(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)


def test_a_real_plan_answers_as_onnx_runtime_does(plan: Path, expected: Any) -> None:
    with load(plan) as session:
        for rows in (1, 8, 3):
            given = rows_of(rows)
            np.testing.assert_allclose(
                session.run({"input": given})["output"], expected(given), rtol=RELATIVE, atol=RELATIVE
            )


@pytest.mark.parametrize("graphs", [0, 2, 8])
def test_eight_threads_get_the_answers_that_one_gets(made: Made, graphs: int) -> None:
    backend = made(contexts=3, graphs=graphs)
    backend.warm_up()
    given = [rows_of(1 + seed % 8, seed) for seed in range(400)]
    alone = [backend.run({"input": array})["output"] for array in given]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda array: backend.run({"input": array})["output"], given))
    for one, other in zip(alone, together, strict=True):
        if backend._manifest.backend == "tensorrt_rtx":  # which exchanges its kernels when it has compiled better ones
            np.testing.assert_allclose(one, other, rtol=RELATIVE, atol=RELATIVE)
        else:
            np.testing.assert_array_equal(one, other)


def test_tensorrt_lets_itself_be_captured(made: Made, expected: Any) -> None:
    backend = made(contexts=1, graphs=4)
    for seed in range(6):
        for rows in (2, 5):
            given = rows_of(rows, seed)
            np.testing.assert_allclose(
                backend.run({"input": given})["output"], expected(given), rtol=RELATIVE, atol=RELATIVE
            )
    facts = backend.describe()
    assert facts["graphs_refused"] == []
    assert facts["graphs_kept"] == (2 if facts["graphs"] == "captured" else 0)


def test_tensors_of_torch_are_read_where_they_are_and_outputs_stay_there(made: Made, expected: Any) -> None:
    torch: Any = pytest.importorskip("torch")
    backend = made(contexts=2, graphs=4)
    (spec,) = backend._manifest.inputs
    stream = torch.cuda.Stream()
    for turn in range(20):
        rows = 1 + turn % 4
        with torch.cuda.stream(stream if turn % 2 else torch.cuda.default_stream()):
            busy = torch.randn(2048, 2048, device="cuda")
            for _ in range(5):
                busy = busy @ busy.softmax(1)  # so that the input is not there yet when the call begins
            given = torch.randn(rows + 1, 8, device="cuda")[1:] + 0 * busy[0, 0]
            answer = backend.run({"input": as_feed(spec, given)}, on_device=True)["output"]
        shared = torch.as_tensor(answer, device="cuda")
        assert shared.data_ptr() == answer.address == torch.from_dlpack(answer).data_ptr()
        np.testing.assert_allclose(shared.cpu().numpy(), expected(given.cpu().numpy()), rtol=RELATIVE, atol=RELATIVE)
        np.testing.assert_array_equal(answer.numpy(), shared.cpu().numpy())


def test_memory_of_outputs_comes_back(made: Made) -> None:
    torch: Any = pytest.importorskip("torch")
    backend = made(contexts=1)
    backend.warm_up()
    backend.run({"input": rows_of(8)}, on_device=True)
    before, _ = torch.cuda.mem_get_info()
    for _ in range(2000):
        backend.run({"input": rows_of(8)}, on_device=True)
    after, _ = torch.cuda.mem_get_info()
    assert after >= before - (1 << 20)


def test_kernels_of_tensorrt_rtx_are_kept(made: Made, plan: Path) -> None:
    if read_verified(plan).manifest.backend != "tensorrt_rtx":
        pytest.skip("TensorRT compiles when it builds")
    first = made(contexts=2)
    first.warm_up()
    assert Path(str(first.describe()["runtime_cache"])).stat().st_size > 0
    assert made(contexts=1).describe()["runtime_cache_bytes"] == first.describe()["runtime_cache_bytes"]
