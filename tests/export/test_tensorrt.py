"""Real builds with tensorrt_rtx, which needs no GPU."""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.export.conftest import Exported
from tnm_pipeline.engines import EnvironmentLacks, verify_artifact
from tnm_pipeline.engines.driver import Driver, Gpu
from tnm_pipeline.export import tensorrt
from tnm_pipeline.export.build_log import BuildLog
from tnm_pipeline.export.errors import BuildFailed, ExportRejected
from tnm_pipeline.export.rtx_plan import capabilities_in_header
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.export.tensorrt import available_builders, build_plan

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)


def _build(exported: Exported, path: Path, **changes: Any) -> tensorrt.BuildReport:
    arguments: dict[str, Any] = {
        "sparse": False,
        "precision": "fp16",
        "sparsity": inspect_onnx(exported.fp16).summary(),
        "backend": "tensorrt_rtx",
        "compute_capabilities": ("8.9",),
    }
    return build_plan(exported.fp16, path, **{**arguments, **changes})


@needs_rtx
@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_plan_and_manifest(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    targets = ("8.0", "12.0")
    report = _build(exported, tmp_path / "m.plan", sparse=True, compute_capabilities=targets, batch=(1, 2, 4))
    manifest = verify_artifact(tmp_path / "m.plan")
    assert manifest == report.manifest
    assert manifest.backend == "tensorrt_rtx"
    assert manifest.sparse_weights_flag is True
    assert manifest.compute_capabilities == targets
    assert manifest.inputs[0].dtype == "float32"
    assert dict(manifest.inputs[0].ranges) == {"batch": (1, 2, 4)}
    assert (tmp_path / (manifest.source_onnx or "")).resolve() == exported.fp16.resolve()
    assert manifest.sparsity["eligible"] == 1


@needs_rtx
@pytest.mark.parametrize("targets", [("7.5",), ("8.6",), ("8.9", "12.1"), ("7.5", "8.0", "8.6", "12.0")])
def test_header_states_the_capabilities(targets: tuple[str, ...], mlp: Exported, tmp_path: Path) -> None:
    _build(mlp, tmp_path / "m.plan", compute_capabilities=targets)
    assert capabilities_in_header((tmp_path / "m.plan").read_bytes()) == set(targets)


@needs_rtx
def test_progress_counts_every_phase_up(mlp: Exported, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    _build(mlp, tmp_path / "m.plan", on_progress=lambda *step: seen.append(step))
    assert seen
    assert all(1 <= done <= total for _, done, total in seen)


@needs_rtx
def test_what_progress_raises_stops_the_build(mlp: Exported, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(mlp, tmp_path / "m.plan", on_progress=interrupt)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_builder_failure_carries_its_log(mlp: Exported, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"for 7\.5:\n.*FP32 GEMM is not supported"):
        build_plan(
            mlp.fp32,
            tmp_path / "m.plan",
            sparse=False,
            precision="fp32",
            sparsity={},
            backend="tensorrt_rtx",
            compute_capabilities=("7.5",),
        )


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp32"}, ExportRejected, "computes in HALF, not FLOAT as fp32 promises"),
        ({"compute_capabilities": ("9.0",)}, EnvironmentLacks, r"capability 9\.0; choose from 7\.5"),
        ({"compute_capabilities": ()}, EnvironmentLacks, "none given"),
        ({"batch": (4, 2, 8)}, ValueError, "min <= opt <= max"),
    ],
)
def test_refused(
    changes: dict[str, object], error: type[Exception], message: str, mlp: Exported, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        _build(mlp, tmp_path / "m.plan", **changes)
    assert not list(tmp_path.iterdir())


def test_malformed_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"git-lfs pointer")
    with pytest.raises(ExportRejected, match="not a readable ONNX file"):
        build_plan(tmp_path / "m.onnx", tmp_path / "m.plan", sparse=False, precision="fp16", sparsity={})


CPU_ONLY = Driver(None, (), "no NVIDIA driver is installed")
WITH_GPU = Driver("13.0", (Gpu("NVIDIA H200", "9.0"),), None)


@pytest.mark.parametrize(
    ("installed", "driver", "expected"),
    [
        (["tensorrt", "tensorrt_rtx"], WITH_GPU, "tensorrt"),
        (["tensorrt", "tensorrt_rtx"], CPU_ONLY, "tensorrt_rtx"),
        (["tensorrt_rtx"], WITH_GPU, "tensorrt_rtx"),
    ],
)
def test_auto(installed: list[str], driver: Driver, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "available_builders", lambda: installed)
    assert tensorrt._choose("auto", driver) == expected


@pytest.mark.parametrize(
    ("installed", "backend", "message"),
    [
        ([], "auto", "pip install tensorrt-rtx"),
        (["tensorrt_rtx"], "tensorrt", r"pip install \"tnm-pipeline\[tensorrt\]\""),
        (["tensorrt"], "tensorrt", "no NVIDIA driver is installed; use backend tensorrt_rtx"),
    ],
)
def test_missing_builder_names_the_way_out(
    installed: list[str], backend: tensorrt.Backend, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided before anything is imported: tensorrt without a driver crashes the process."""
    monkeypatch.setattr(tensorrt, "available_builders", lambda: installed)
    with pytest.raises(EnvironmentLacks, match=message):
        tensorrt._choose(backend, CPU_ONLY)


def test_available_builders_are_installed() -> None:
    assert all(importlib.util.find_spec(name) for name in available_builders())


@pytest.mark.parametrize(
    ("lines", "eligible", "picked"),
    [
        ([], None, None),
        (["(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c"], 3, None),
        (["(Sparsity) Chose 0 layer(s) using sparse tactics: "], None, 0),
        (
            [
                "(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620",
                "(Sparsity) TRT inference plan picked sparse implementation for layers:",
            ],
            2,
            0,
        ),
    ],
)
def test_sparsity_lines_of_a_log(lines: list[str], eligible: int | None, picked: int | None) -> None:
    log = BuildLog()
    for line in lines:
        log.add("VERBOSE", line)
    assert (log.eligible_layers, log.picked_layers) == (eligible, picked)


def test_trouble_prefers_errors() -> None:
    log = BuildLog()
    assert log.trouble() == "the builder logged nothing"
    log.add("INFO", "hello")
    assert log.trouble() == "hello"
    log.add("ERROR", "broken")
    log.add("VERBOSE", "detail")
    assert log.trouble() == "broken"


def _header(magic: bytes, layout: int, bits: int) -> bytes:
    return magic + bytes(4) + struct.pack("<I", layout) + bytes(20) + struct.pack("<I", bits)


@pytest.mark.parametrize(
    "plan", [b"", b"vtrt", _header(b"ftrt", 2, 1), _header(b"vtrt", 3, 1), _header(b"vtrt", 2, 1 << 6)]
)
def test_unknown_header_is_left_unread(plan: bytes) -> None:
    assert capabilities_in_header(plan) is None


def test_known_header() -> None:
    assert capabilities_in_header(_header(b"vtrt", 2, 0b001001)) == {"7.5", "8.9"}
