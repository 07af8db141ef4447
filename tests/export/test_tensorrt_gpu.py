"""Builds on a machine with a GPU: with a stand-in for tensorrt everywhere, and for real where there is one."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.export.graphs import products
from tnm_pipeline.engines import EnvironmentLacks, FeedError, load, verify_artifact
from tnm_pipeline.engines.driver import Driver, Gpu, probe
from tnm_pipeline.engines.machine import this_machine
from tnm_pipeline.export import tensorrt
from tnm_pipeline.export.errors import BuildFailed
from tnm_pipeline.export.tensorrt import BuildOptions, available_builders, build_plan

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
STAND_IN = Path(__file__).with_name("building") / "stand_in_tensorrt.py"
SETTINGS: dict[str, Any] = {"sparse": True, "precision": "fp16", "sparsity": {}}


@pytest.fixture
def with_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has a GPU, and `STAND_IN` for the building process to import as tensorrt."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tensorrt.py").write_bytes(STAND_IN.read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("STAND_IN_WEIGHTS", "Half")
    monkeypatch.setattr(tensorrt, "available_builders", lambda: ["tensorrt", "tensorrt_rtx"])
    monkeypatch.setattr(tensorrt, "probe", lambda: Driver("13.0", (Gpu("NVIDIA L4", "8.9"),), None))


@needs_rtx
@pytest.mark.usefixtures("with_tensorrt")
def test_tensorrt_on_its_gpu(tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", "fp16")
    options = BuildOptions(timing_cache=tmp_path / "timing", hardware_compatible="same_compute_capability")
    for builds in (1, 2):
        report = build_plan(path, tmp_path / "m.plan", **SETTINGS, options=options, compute_capabilities=("12.0",))
        assert report.timing_cache_used is True
        assert (tmp_path / "timing").read_bytes() == b"entry;" * builds
    manifest = verify_artifact(tmp_path / "m.plan")
    assert (manifest.backend, manifest.backend_version) == ("tensorrt", "10.13.2.6")
    assert (manifest.compute_capabilities, manifest.gpu) == (("8.9",), "NVIDIA L4")
    assert (manifest.operating_system, manifest.cpu_architecture) == this_machine()
    assert (report.eligible_layers, report.eligible_names) == (2, ("first", "second + leave"))
    assert (report.picked_layers, report.picked_names) == (1, ("second + leave",))
    assert report.inspector == [{"Name": "second + leave", "Weights": {"Type": "Half", "Count": 256}}]
    assert report.notes == ()


@needs_rtx
@pytest.mark.usefixtures("with_tensorrt")
def test_an_engine_in_another_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = products(tmp_path / "m.onnx", "fp16")
    monkeypatch.setenv("STAND_IN_WEIGHTS", "Float")
    with pytest.raises(BuildFailed, match=r"layer second \+ leave with weights of type Float, and fp16 was promised"):
        build_plan(path, tmp_path / "m.plan", **SETTINGS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "path"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", tensorrt.BUILDERS)
def test_on_a_gpu(backend: tensorrt.Backend, tmp_path: Path) -> None:
    """What only a GPU shows: layers from the engine inspector, a timing cache, profiles that change while it runs."""
    if backend not in available_builders():
        pytest.skip(f"{backend} is not installed")
    path = products(tmp_path / "m.onnx", "fp16", rows=("batch", "sequence"), width=64)
    here = probe().gpus[0].compute_capability
    changes: dict[str, Any] = {
        "backend": backend,
        "compute_capabilities": (here,),
        "profiles": [
            {"batch": (1, 1, 1), "sequence": (1, 64, 128)},
            {"batch": (1, 8, 16), "sequence": (1, 16, 32)},
        ],
        "options": BuildOptions(timing_cache=tmp_path / "timing"),
    }
    try:
        report = build_plan(path, tmp_path / "m.plan", **SETTINGS, **changes)
    except EnvironmentLacks as error:
        pytest.skip(str(error))  # tensorrt_rtx does not know every GPU
    assert report.inspector
    assert report.timing_cache_used == (backend == "tensorrt") == (tmp_path / "timing").exists()
    reference = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with load(tmp_path / "m.plan") as session:
        for rows in ((1, 128), (16, 32), (1, 1), (2, 5)):
            feeds = {"x": np.random.default_rng(0).standard_normal((*rows, 64)).astype(np.float32)}
            expected = np.asarray(reference.run(["y"], feeds)[0])
            found = session.run(feeds)["y"]
            assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
        with pytest.raises(FeedError, match="no profile of the plan holds batch = 16, sequence = 128"):
            session.run({"x": np.zeros((16, 128, 64), np.float32)})
