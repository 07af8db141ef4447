"""An ONNX file to a TensorRT plan with its manifest, with tensorrt 10, tensorrt 11 or tensorrt_rtx.

The builder works in a process of its own: what happens to that process becomes an exception here. Nothing here touches
a Runtime: tensorrt's segfaults on a machine without a driver.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tnm_pipeline.engines.artifact import sha256_of, write_manifest
from tnm_pipeline.engines.driver import Driver, probe
from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.machine import this_machine
from tnm_pipeline.engines.manifest import Manifest, Ranges, TensorSpec
from tnm_pipeline.export.building.engine_precision import check_engine_precision
from tnm_pipeline.export.building.log import BuildLog
from tnm_pipeline.export.building.outcome import Hearing, built
from tnm_pipeline.export.building.process import run
from tnm_pipeline.export.building.profiles import profiles_of, shapes_of
from tnm_pipeline.export.building.progress import BuildProgress
from tnm_pipeline.export.building.request import BuildRequest, Built
from tnm_pipeline.export.building.rtx_plan import capabilities_in_header
from tnm_pipeline.export.environment import package_versions
from tnm_pipeline.export.errors import BuildFailed, BuildSettingError, ExportRejected

BUILDERS = ("tensorrt", "tensorrt_rtx")
Backend = Literal["auto", "tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "fp16", "bf16"]
Progress = Callable[[BuildProgress], None]

_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")  # of a plan's tensors


@dataclass(frozen=True)
class BuildOptions:
    """How to build. What a builder lacks is refused, or left aside with a note in the report.

    Attributes:
        workspace_mib: Most scratch memory of a tactic, in MiB; None leaves it to the builder.
        timing_cache: A file that keeps what tactics took, for later builds on the same GPU; it need not exist. Left
            aside by tensorrt_rtx, which times nothing while it builds.
        version_compatible: The plan shall run with later releases of TensorRT too.
        hardware_compatible: Run on other GPUs than that of this machine: on all since Ampere, or on those of the same
            compute capability. tensorrt_rtx refuses it: there, list the GPUs in `compute_capabilities`.
        time_limit_s: Seconds after which a build is stopped; None for ever.
        detailed: Keep in the plan what the engine inspector tells of each layer, names of tactics included.

    Raises:
        BuildSettingError: A limit is not positive.
    """

    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["ampere_plus", "same_compute_capability"] | None = None
    time_limit_s: float | None = 7200
    detailed: bool = True

    def __post_init__(self) -> None:
        for name in ("workspace_mib", "time_limit_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BuildSettingError(f"{name} is {value}; give more than 0, or None for no limit")


@dataclass(frozen=True)
class BuildReport:
    """One finished build.

    Attributes:
        manifest: What was written beside the plan.
        eligible_layers: Layers that the builder called eligible for sparse tactics; None when it did not say.
        picked_layers: Layers for which it chose one; None when it did not say. With None, the most that can be
            claimed is `manifest.sparse_weights_flag`.
        eligible_names: Their names; None when it did not list them.
        picked_names: Likewise.
        seconds: What the build took, its process's start included.
        timing_cache_used: Whether a timing cache was read and kept; None where none was asked for.
        inspector: One object per layer from the engine inspector; None without a GPU that runs the plan.
        notes: Settings that the builder left aside, each with the reason.
        log: All that the builder said.
    """

    manifest: Manifest
    eligible_layers: int | None
    picked_layers: int | None
    eligible_names: tuple[str, ...] | None
    picked_names: tuple[str, ...] | None
    seconds: float
    timing_cache_used: bool | None
    inspector: list[dict[str, Any]] | None
    notes: tuple[str, ...]
    log: BuildLog


def available_builders() -> list[str]:
    """The TensorRT packages that are installed, found without importing them."""
    return [name for name in BUILDERS if importlib.util.find_spec(name) is not None]


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    *,
    sparse: bool,
    precision: Precision,
    sparsity: Mapping[str, object],
    backend: Backend = "auto",
    profiles: Sequence[Ranges] = ({"batch": (1, 8, 64)},),
    compute_capabilities: Sequence[str] = ("8.0", "8.9", "12.0"),
    keep_fp32: Collection[str] = (),
    options: BuildOptions = BuildOptions(),
    provenance: Mapping[str, object] = MappingProxyType({}),
    on_progress: Progress | None = None,
) -> BuildReport:
    """Build a strongly typed plan in a process of its own, and write it with its manifest.

    Args:
        onnx_path: The graph; its types decide the plan's precision.
        plan_path: The file to write; its folder exists.
        sparse: Allow sparse tactics. The builder still chooses.
        precision: What the graph computes in; a convolution or matrix product in another type is refused.
        sparsity: `SparsityReport.summary()` of `onnx_path`, for the manifest.
        backend: `"auto"` takes tensorrt where it is installed and a GPU is present, else tensorrt_rtx.
        profiles: For each optimisation profile, (min, opt, max) of every dimension that may vary, by name. Names that
            no input has are left out.
        compute_capabilities: GPUs to build for with tensorrt_rtx, which needs none here. tensorrt builds for
            the GPU of this machine only and ignores them.
        keep_fp32: Names of nodes that compute in fp32 whatever `precision` says.
        options: How to build.
        provenance: What else is known of where the plan comes from, for the manifest, which states the versions of
            packages too.
        on_progress: Called after every step of every phase, and at least once a second. What it raises,
            `KeyboardInterrupt` included, ends the build's process and comes out of this function.

    Returns:
        The manifest, what the builder said about sparse layers, and the engine inspector's answer.

    Raises:
        EnvironmentLacks: No builder is installed, tensorrt was asked for on a machine without a GPU, or the builder
            does not know a compute capability or an option.
        ExportRejected: The ONNX file is malformed, not in `precision`, or has inputs that no plan can have.
        BuildSettingError: The profiles contradict themselves or the graph.
        OSError: The folder is missing, read-only or full.
        BuildOutOfMemory: Memory ran out.
        BuildFailed: The parser or the builder gave up, crashed, was killed or ran into the time limit.
    """
    from tnm_pipeline.export.artifacts import read_onnx, tensor_specs

    begun = time.perf_counter()
    driver = probe()
    name = _choose(backend, driver)
    # TensorRT-RTX plans run on Linux and Windows alike. Source: NVIDIA, "CPU-Only AOT and TensorRT-RTX Engines".
    machine = this_machine()._asdict() if name == "tensorrt" else {}
    graph = read_onnx(onnx_path).graph
    used = profiles_of(tensor_specs(graph.input), profiles)
    inputs = tensor_specs(graph.input, used)
    outputs = _spanned(tensor_specs(graph.output), inputs)
    _check_dtypes(inputs + outputs)
    here = tuple(gpu.compute_capability for gpu in driver.gpus[:1])
    targets = here if name == "tensorrt" else tuple(compute_capabilities)
    draft = plan_path.with_name(f".{plan_path.name}.{os.getpid()}.tmp")
    request = BuildRequest(
        builder=name,
        onnx=str(onnx_path),
        plan=str(draft),
        sparse=sparse,
        precision=precision,
        keep_fp32=tuple(keep_fp32),
        profiles=tuple(shapes_of(inputs, profile) for profile in used),
        compute_capabilities=targets,
        workspace_mib=options.workspace_mib,
        timing_cache=None if options.timing_cache is None else str(options.timing_cache),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        detailed=options.detailed,
        inspect=bool(here) and here[0] in targets,
    )
    hearing = Hearing(on_progress)
    try:
        draft.touch()  # a folder that cannot be written to is no surprise for the end of a long build
        ending = run(request, hearing.hear, options.time_limit_s)
        result = built(hearing, ending, request, graph, targets)
        check_engine_precision(result.inspector or (), precision, request.keep_fp32)
        _check_header(name, draft, targets)
        manifest = Manifest(
            artifact=plan_path.name,
            sha256=sha256_of(draft),
            bytes=draft.stat().st_size,
            backend=name,
            backend_version=str(hearing.version),
            precision=precision,
            inputs=inputs,
            outputs=outputs,
            source_onnx=Path(os.path.relpath(onnx_path, plan_path.parent)).as_posix(),
            source_sha256=sha256_of(onnx_path),
            sparse_weights_flag=sparse,
            compute_capabilities=targets,
            gpu=driver.gpus[0].name if driver.gpus else None,
            driver=None if driver.cuda_version is None else f"CUDA {driver.cuda_version}",
            sparsity=sparsity,
            profiles=used,
            **machine,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            provenance={**provenance, "packages": package_versions("tnm-pipeline", "onnx", name.replace("_", "-"))},
        )
        draft.replace(plan_path)
    finally:
        draft.unlink(missing_ok=True)
    write_manifest(plan_path, manifest)
    return _report(manifest, hearing.log, result, time.perf_counter() - begun)


def _choose(backend: Backend, driver: Driver) -> str:
    installed = available_builders()
    if backend == "auto":
        if "tensorrt" in installed and driver.gpus:
            return "tensorrt"
        backend = "tensorrt_rtx"
    if backend not in installed:
        package = '"tnm-pipeline[tensorrt]"' if backend == "tensorrt" else "tensorrt-rtx"
        raise EnvironmentLacks(
            f"{backend} is not installed (found: {', '.join(installed) or 'no builder'}); run `pip install {package}`"
        )
    if backend == "tensorrt" and not driver.gpus:
        raise EnvironmentLacks(
            f"tensorrt builds only on the GPU that it builds for, and {driver.reason}; "
            "use backend tensorrt_rtx, which builds without one"
        )
    return backend


def _spanned(outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The outputs with the ranges of the dimensions that they share with inputs; others follow from the data."""
    known = {dim: sizes for spec in inputs for dim, sizes in spec.ranges.items()}
    return tuple(
        replace(spec, ranges={dim: known[dim] for dim in spec.shape if isinstance(dim, str) and dim in known})
        for spec in outputs
    )


def _check_dtypes(specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if spec.dtype not in _DTYPES:
            raise ExportRejected(
                f"{spec.name!r} is {spec.dtype}, which TensorRT does not have; export the model with one of "
                f"{', '.join(_DTYPES)} there"
            )


def _check_header(name: str, plan: Path, targets: tuple[str, ...]) -> None:
    with plan.open("rb") as file:
        built_for = capabilities_in_header(file.read(64)) if name == "tensorrt_rtx" else None
    if built_for is not None and built_for != set(targets):
        raise BuildFailed(
            f"asked for compute capabilities {', '.join(sorted(targets))}, "
            f"the plan's header states {', '.join(sorted(built_for)) or 'none'}; build for each in a plan of its own"
        )


def _report(manifest: Manifest, log: BuildLog, result: Built, seconds: float) -> BuildReport:
    return BuildReport(
        manifest=manifest,
        eligible_layers=log.eligible_layers,
        picked_layers=log.picked_layers,
        eligible_names=log.eligible_names,
        picked_names=log.picked_names,
        seconds=seconds,
        timing_cache_used=result.timing_cache_used,
        inspector=result.inspector,
        notes=tuple(result.notes),
        log=log,
    )
