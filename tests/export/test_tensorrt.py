"""Real builds with tensorrt_rtx, which needs no GPU."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.export.conftest import Exported
from tests.export.graphs import products
from tnm_pipeline.engines import EnvironmentLacks, verify_artifact
from tnm_pipeline.engines.driver import Driver, Gpu
from tnm_pipeline.export import tensorrt
from tnm_pipeline.export.artifacts import tensor_specs
from tnm_pipeline.export.building.progress import BuildProgress
from tnm_pipeline.export.building.rtx_plan import capabilities_in_header
from tnm_pipeline.export.environment import package_versions
from tnm_pipeline.export.errors import BuildFailed, BuildSettingError, ExportRejected
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.export.tensorrt import BuildOptions, BuildReport, available_builders, build_plan

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
BATCH = {"batch": (1, 2, 4)}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return products(tmp_path_factory.mktemp("graph") / "m.onnx", "fp16")


def build(onnx_path: Path, plan: Path, **changes: Any) -> BuildReport:
    arguments: dict[str, Any] = {
        "sparse": False,
        "precision": "fp16",
        "sparsity": {},
        "backend": "tensorrt_rtx",
        "profiles": [BATCH],
        "compute_capabilities": ("8.9",),
    }
    return build_plan(onnx_path, plan, **{**arguments, **changes})


@needs_rtx
@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_plan_and_manifest(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    targets = ("8.0", "8.6", "8.9", "12.0")
    (spec,) = tensor_specs(onnx.load(exported.fp16).graph.input)
    profile = {dim: (1, 2, 4) for dim in spec.shape if isinstance(dim, str)}
    assert "batch" in profile
    summary = inspect_onnx(exported.fp16).summary()
    plan = tmp_path / "m.plan"
    changes = {"sparse": True, "sparsity": summary, "compute_capabilities": targets, "profiles": [profile]}
    report = build(exported.fp16, plan, **changes)
    manifest = verify_artifact(plan)
    assert manifest == report.manifest
    assert manifest.backend == "tensorrt_rtx"
    assert manifest.sparse_weights_flag is True
    assert manifest.compute_capabilities == targets
    assert capabilities_in_header(plan.read_bytes()) == set(targets)
    assert manifest.profiles == (profile,)
    assert manifest.inputs[0].ranges == profile
    assert manifest.outputs[0].ranges["batch"] == (1, 2, 4)
    assert {spec.dtype for spec in (*manifest.inputs, *manifest.outputs)} == {"float32"}
    assert (tmp_path / (manifest.source_onnx or "")).resolve() == exported.fp16.resolve()
    assert manifest.sparsity["eligible"] == 1
    assert (manifest.operating_system, manifest.cpu_architecture) == (None, None)  # TensorRT-RTX's move between them
    assert manifest.provenance == {"packages": package_versions("tnm-pipeline", "onnx", "tensorrt-rtx")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.plan", "m.plan.manifest.json"]
    assert report.seconds > 0
    assert report.inspector is None  # needs a GPU
    assert report.eligible_names is None  # tensorrt_rtx does not say
    assert report.log.last_node


@needs_rtx
def test_three_profiles_of_two_dimensions(tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", "fp16", rows=("batch", "sequence"))
    profiles = [
        {"batch": (1, 1, 1), "sequence": (1, 8, 16)},
        {"batch": (1, 8, 64), "sequence": (1, 16, 32)},
        {"batch": (2, 2, 2), "sequence": (16, 64, 128)},
    ]
    report = build(path, tmp_path / "m.plan", profiles=profiles)
    manifest = verify_artifact(tmp_path / "m.plan")
    assert [dict(profile) for profile in manifest.profiles] == profiles
    assert dict(manifest.inputs[0].ranges) == {"batch": (1, 1, 64), "sequence": (1, 8, 128)}
    # The log tells of the layers of every profile, which is how we know that the builder took all three.
    assert any("[profile 2]" in text for _, text in report.log.messages)


@needs_rtx
@pytest.mark.parametrize("targets", [("7.5",), ("8.9", "12.1"), ("7.5", "8.0", "8.6", "12.0")])
def test_header_states_the_capabilities(targets: tuple[str, ...], graph: Path, tmp_path: Path) -> None:
    build(graph, tmp_path / "m.plan", compute_capabilities=targets)
    assert capabilities_in_header((tmp_path / "m.plan").read_bytes()) == set(targets)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", precision)
    assert build(path, tmp_path / "m.plan", precision=precision).manifest.precision == precision


@needs_rtx
@pytest.mark.parametrize(("precision", "complaint"), [("fp32", "FP32 GEMM is not supported"), ("bf16", "b16")])
def test_a_precision_that_a_gpu_does_not_have(precision: str, complaint: str, tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", precision)
    message = rf"(?s)for 7\.5, 8\.9: .*{complaint}.*leave it out of compute_capabilities"
    with pytest.raises(BuildFailed, match=message):
        build(path, tmp_path / "m.plan", precision=precision, compute_capabilities=("7.5", "8.9"))


@needs_rtx
def test_fixed_sizes_need_no_profile(tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", rows=(4,))
    assert build(path, tmp_path / "m.plan", precision="fp32").manifest.profiles == ()


@needs_rtx
def test_progress_counts_every_phase_up(graph: Path, tmp_path: Path) -> None:
    seen: list[BuildProgress] = []
    build(graph, tmp_path / "m.plan", on_progress=seen.append)
    assert seen
    assert all(0 <= step.done <= step.total for step in seen)
    assert seen[-1].phase == "Building engine"


@needs_rtx
def test_what_a_builder_leaves_aside_is_said(graph: Path, tmp_path: Path) -> None:
    options = BuildOptions(timing_cache=tmp_path / "timing", workspace_mib=64)
    report = build(graph, tmp_path / "m.plan", options=options)
    assert report.timing_cache_used is False
    assert report.notes == ("timing_cache is left aside: tensorrt_rtx times no tactics while it builds",)
    assert not options.timing_cache or not options.timing_cache.exists()


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp32"}, ExportRejected, "node first computes in HALF, not FLOAT as fp32 promises"),
        ({"precision": "bf16"}, ExportRejected, "HALF, not BF16"),
        ({"precision": "bf16", "keep_fp32": ("first", "second")}, ExportRejected, "HALF, not BF16"),
        ({"compute_capabilities": ("9.0",)}, EnvironmentLacks, r"capability 9\.0; choose from 7\.5"),
        ({"compute_capabilities": ()}, EnvironmentLacks, "none given"),
        ({"profiles": [{"batch": (4, 2, 8)}]}, BuildSettingError, "min <= opt <= max"),
        ({"options": BuildOptions(hardware_compatible="ampere_plus")}, EnvironmentLacks, r"hardware compatible \(amp"),
        (
            {"options": BuildOptions(version_compatible=True)},
            BuildFailed,
            "(?s)libnvinfer_lean.*lacks the lean runtime that version_compatible needs: leave it out",
        ),
        ({"options": BuildOptions(workspace_mib=1)}, BuildFailed, "(?s)workspace.*raise workspace_mib"),
        ({"options": BuildOptions(time_limit_s=0.01)}, BuildFailed, r"(?s)stopped.*Raise time_limit_s"),
    ],
)
def test_refused(changes: dict[str, object], error: type[Exception], message: str, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(graph, tmp_path / "m.plan", **changes)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_nodes_that_stay_in_fp32(tmp_path: Path) -> None:
    path = products(tmp_path / "m.onnx", "fp32")
    with pytest.raises(ExportRejected, match="node second computes in FLOAT"):
        build(path, tmp_path / "m.plan", keep_fp32=("first",))
    assert build(path, tmp_path / "m.plan", keep_fp32=("first", "second")).manifest.precision == "fp16"


def test_limits_must_be_positive() -> None:
    with pytest.raises(BuildSettingError, match="workspace_mib is 0"):
        BuildOptions(workspace_mib=0)
    with pytest.raises(BuildSettingError, match=r"time_limit_s is -1\.0"):
        BuildOptions(time_limit_s=-1.0)


def test_malformed_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"git-lfs pointer")
    with pytest.raises(ExportRejected, match="not a readable ONNX file"):
        build(tmp_path / "m.onnx", tmp_path / "m.plan")


@needs_rtx
@pytest.mark.slow
def test_bench_build_measures_and_writes(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench_build.py"
    arguments = ["--quick", "--json", str(tmp_path / "report.json")]
    subprocess.run([sys.executable, script, *arguments], capture_output=True, check=True, timeout=300)
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["profiles"]) for row in rows] == [("ResNet-18", 1), ("ResNet-18", 3)]
    assert all(row["build_plan_s"] > 0 and row["by_hand_s"] > 0 for row in rows)


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


def test_importing_is_light() -> None:
    """Neither module may wait for packages that a build may not need: the child's start is paid for every plan."""
    code = "import sys, tnm_pipeline.export.{}; print(*sys.modules)"
    heavy = {
        "tensorrt": {"torch", "onnx", "onnxruntime", "onnx_ir", "tensorrt_rtx"},
        "building.child": {"torch", "onnx", "onnxruntime", "numpy", "tensorrt_rtx", "tnm_pipeline.engines"},
    }
    for module, unwanted in heavy.items():
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True, timeout=60
        )
        assert not unwanted & set(done.stdout.split()), module


def _header(magic: bytes, layout: int, bits: int) -> bytes:
    return magic + bytes(4) + struct.pack("<I", layout) + bytes(20) + struct.pack("<I", bits)


@pytest.mark.parametrize(
    "plan", [b"", b"vtrt", _header(b"ftrt", 2, 1), _header(b"vtrt", 3, 1), _header(b"vtrt", 2, 1 << 6)]
)
def test_unknown_header_is_left_unread(plan: bytes) -> None:
    assert capabilities_in_header(plan) is None


def test_known_header() -> None:
    assert capabilities_in_header(_header(b"vtrt", 2, 0b001001)) == {"7.5", "8.9"}
