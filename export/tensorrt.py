"""An ONNX file to a TensorRT plan with its manifest: one builder for tensorrt 10, tensorrt 11 and tensorrt_rtx.

Their APIs are told apart by feature, never by version number. Nothing here touches a Runtime: tensorrt's
segfaults on a machine without a driver.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import onnx

from tnm_pipeline.engines.artifact import sha256_of, write_manifest
from tnm_pipeline.engines.driver import Driver, probe
from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.export.artifacts import read_onnx, tensor_specs
from tnm_pipeline.export.build_log import BuildLog
from tnm_pipeline.export.errors import BuildFailed, ExportRejected
from tnm_pipeline.export.rtx_plan import capabilities_in_header
from tnm_pipeline.training.atomic import write_atomically

BUILDERS = ("tensorrt", "tensorrt_rtx")
Backend = Literal["auto", "tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "fp16"]
Progress = Callable[[str, int, int], None]

_TRT_DTYPES = {"fp32": "FLOAT", "fp16": "HALF"}


@dataclass(frozen=True)
class BuildReport:
    """One finished build.

    Attributes:
        manifest: What was written beside the plan.
        eligible_layers: Layers that the builder called eligible for sparse tactics; None when it did not say.
        picked_layers: Layers for which it chose one; None when it did not say. With None, the most that can be
            claimed is `manifest.sparse_weights_flag`.
    """

    manifest: Manifest
    eligible_layers: int | None
    picked_layers: int | None


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
    batch: tuple[int, int, int] = (1, 8, 64),
    compute_capabilities: Sequence[str] = ("8.0", "8.9", "12.0"),
    on_progress: Progress | None = None,
) -> BuildReport:
    """Build a strongly typed plan and write it with its manifest.

    Args:
        onnx_path: The graph; its types decide the plan's precision.
        plan_path: The file to write; its folder exists.
        sparse: Allow sparse tactics. The builder still chooses.
        precision: What the graph computes in; a convolution or matrix product in another type is refused.
        sparsity: `SparsityReport.summary()` of `onnx_path`, for the manifest.
        backend: `"auto"` takes tensorrt where it is installed and a GPU is present, else tensorrt_rtx.
        batch: (min, opt, max) of dimension 0 where it is dynamic.
        compute_capabilities: GPUs to build for with tensorrt_rtx, which needs none here. tensorrt builds for
            the GPU of this machine only and ignores them.
        on_progress: Called with (phase, steps done, steps in all), possibly from the builder's threads. What it
            raises stops the build and comes out of this function.

    Returns:
        The manifest and what the builder said about sparse layers.

    Raises:
        EnvironmentLacks: No builder is installed, or tensorrt was asked for on a machine without a GPU.
        ExportRejected: The ONNX file is malformed, not in `precision`, or dynamic beyond the batch.
        ValueError: A compute capability is unknown to this builder, or `batch` is not 1 <= min <= opt <= max.
        BuildFailed: The parser or the builder gave up.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise ValueError(f"batch must be 1 <= min <= opt <= max, not {batch}")
    driver = probe()
    name = _choose(backend, driver)
    trt = _import(name)
    graph = read_onnx(onnx_path).graph
    inputs, outputs = tensor_specs(graph.input, batch), tensor_specs(graph.output, batch)
    logger = _logger(trt)
    log = logger.sink = BuildLog()
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildFailed(f"{name} could not create a builder:\n{log.trouble()}")
    network, parser = _parse(trt, builder, logger, onnx_path, log)
    _check_precision(trt, network, precision, onnx_path)
    config = builder.create_builder_config()
    _add_profile(builder, config, graph, batch)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    targets = _set_targets(trt, config, compute_capabilities, driver)
    monitor = None if on_progress is None else _monitor(trt, on_progress)
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise BuildFailed(
            f"{name} {trt.__version__} could not build {onnx_path.name} for {', '.join(targets)}:\n{log.trouble()}"
        )
    del parser  # it owns the weights that the network points to, so it had to live until here
    content = bytes(plan)
    _check_header(name, content, targets)
    write_atomically(plan_path, content)
    manifest = Manifest(
        artifact=plan_path.name,
        sha256=sha256_of(plan_path),
        bytes=len(content),
        backend=name,
        backend_version=trt.__version__,
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
    )
    write_manifest(plan_path, manifest)
    return BuildReport(manifest, log.eligible_layers, log.picked_layers)


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


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EnvironmentLacks(
            f"{name} is installed and does not load: {error}; "
            f"run `pip install --force-reinstall {name.replace('_', '-')}`"
        ) from error


def _parse(trt: Any, builder: Any, logger: Any, path: Path, log: BuildLog) -> tuple[Any, Any]:
    # Where the flag is gone, networks are strongly typed always.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)]
        raise BuildFailed(f"{trt.__name__} cannot parse {path.name}:\n" + ("\n".join(errors[:5]) or log.trouble()))
    return network, parser


def _check_precision(trt: Any, network: Any, precision: Precision, path: Path) -> None:
    """Refuse a graph that computes in another type than promised: a strongly typed plan would obey the graph."""
    heavy = (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    expected = getattr(trt.DataType, _TRT_DTYPES[precision])
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in heavy and layer.get_input(0).dtype != expected:
            raise ExportRejected(
                f"{path.name}: node {layer.name} computes in {layer.get_input(0).dtype.name}, "
                f"not {expected.name} as {precision} promises; convert the graph with to_fp16 or correct `precision`"
            )


def _add_profile(builder: Any, config: Any, graph: onnx.GraphProto, batch: tuple[int, int, int]) -> None:
    specs = [spec for spec in tensor_specs(graph.input, batch) if spec.ranges]
    if not specs:
        return
    profile = builder.create_optimization_profile()
    for spec in specs:
        profile.set_shape(spec.name, *((size, *spec.shape[1:]) for size in batch))
    config.add_optimization_profile(profile)


def _set_targets(trt: Any, config: Any, wanted: Sequence[str], driver: Driver) -> tuple[str, ...]:
    """Tell tensorrt_rtx which GPUs to build for; tensorrt builds for GPU 0 of this machine."""
    if not hasattr(config, "set_compute_capability"):
        return (driver.gpus[0].compute_capability,)
    members = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    unknown = [capability for capability in wanted if capability not in members]
    if unknown or not wanted:
        raise EnvironmentLacks(
            f"{trt.__name__} {trt.__version__} cannot build for compute capability "
            f"{', '.join(unknown) or '(none given)'}; choose from {', '.join(members)}"
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(members[capability], index)
    return tuple(wanted)


def _check_header(name: str, plan: bytes, targets: tuple[str, ...]) -> None:
    built = capabilities_in_header(plan) if name == "tensorrt_rtx" else None
    if built is not None and built != set(targets):
        raise BuildFailed(
            f"asked for compute capabilities {', '.join(sorted(targets))}, "
            f"the plan's header states {', '.join(sorted(built)) or 'none'}; build for each in a plan of its own"
        )


@cache
def _logger(trt: Any) -> Any:
    """The one logger of the process: TensorRT keeps a pointer to the first it meets and ignores later ones."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base exists only once the package is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.sink = BuildLog()

        def log(self, severity: Any, text: str) -> None:
            self.sink.add(severity.name, text)

    return Logger()


def _monitor(trt: Any, on_progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base exists only once the package is imported
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                on_progress(phase, step + 1, self._steps[phase])
            except BaseException as error:  # it must not unwind through C++; build_plan re-raises it
                self.failure = error
            return self.failure is None  # False cancels the build

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
