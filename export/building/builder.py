"""The calls to TensorRT that make a plan: one path for tensorrt 10, tensorrt 11 and tensorrt_rtx.

Their APIs are told apart by feature, never by version number. This runs in a process of its own, which a fault of the
builder may end; so nothing here imports more than the standard library and the builder itself.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tnm_pipeline.export.building.request import BuildRequest, Built, Complaint, ParseRefused
from tnm_pipeline.export.errors import BuildFailed, ExportRejected
from tnm_pipeline.training.atomic import write_atomically

Send = Callable[..., None]
"""Tells the asking process something: the kind of event, then its values."""

_TRT_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
_HEAVY = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


def build(trt: Any, request: BuildRequest, send: Send) -> Built:
    """Build a strongly typed plan and write it to `request.plan`.

    Args:
        trt: The builder's module.
        request: What to build.
        send: Told `"log"` (severity, text), `"start"` (phase, steps), `"step"` (phase, steps done) and `"finish"`
            (phase), possibly from the builder's threads.

    Returns:
        What was built, besides the plan.

    Raises:
        ParseRefused: The parser has complaints.
        ExportRejected: The graph does not compute in the promised precision, or an input steers shapes.
        NotImplementedError: This builder lacks a setting that was asked for.
        BuildFailed: The builder gave up. It says why only in its log.
        OSError: The plan cannot be written, or the timing cache cannot be read or has no folder to be written to.
    """
    logger = _logger(trt, send)
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildFailed("no builder could be created")
    network, parser = _parse(trt, builder, logger, request.onnx)
    _check_inputs(network)
    _check_precision(trt, network, request)
    config = builder.create_builder_config()
    notes: list[str] = []
    _add_profiles(builder, config, request)
    _set_targets(trt, config, request.compute_capabilities)
    _set_options(trt, config, request)
    cache = _timing_cache(config, request, notes)
    monitor = config.progress_monitor = _monitor(trt, send)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed("the builder gave up")
    del parser, monitor  # the network points to the parser's weights, the configuration to the monitor and the cache
    _write(Path(request.plan), plan)
    if request.timing_cache is not None and cache is not None:
        _keep_timing_cache(config, Path(request.timing_cache), notes)
    used = None if request.timing_cache is None else cache is not None
    return Built(used, _inspect(trt, logger, plan, request, notes), tuple(notes))


def _parse(trt: Any, builder: Any, logger: Any, path: str) -> tuple[Any, Any]:
    # Where the flag is gone, networks are strongly typed always.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise ParseRefused(
            [Complaint(error.node_name(), error.node_operator(), error.code().name, error.desc()) for error in errors]
        )
    return network, parser


def _check_inputs(network: Any) -> None:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise ExportRejected(
                f"input {tensor.name!r} is read as a shape: its values would decide the sizes of other tensors, and a "
                "plan is built for ranges of sizes, not of values. Make it a constant of the model before the export"
            )


def _check_precision(trt: Any, network: Any, request: BuildRequest) -> None:
    """Refuse a graph that computes in another type than promised: a strongly typed plan would obey the graph."""
    heavy = {getattr(trt.LayerType, name) for name in _HEAVY}
    floating = {getattr(trt.DataType, name) for name in _TRT_DTYPES.values()}
    expected = getattr(trt.DataType, _TRT_DTYPES[request.precision])
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in heavy:
            continue
        found = layer.get_input(0).dtype
        kept = found == trt.DataType.FLOAT and layer.name in request.keep_fp32
        if found in floating and found != expected and not kept:
            raise ExportRejected(
                f"{Path(request.onnx).name}: node {layer.name} computes in {found.name}, not {expected.name} as "
                f"{request.precision} promises; export the graph in {request.precision}, or build with the precision "
                "that it has"
            )


def _add_profiles(builder: Any, config: Any, request: BuildRequest) -> None:
    for index, shapes in enumerate(request.profiles):
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildFailed(f"optimisation profile {index} is refused: {shapes}")


def _set_targets(trt: Any, config: Any, wanted: Sequence[str]) -> None:
    """Tell tensorrt_rtx which GPUs to build for; tensorrt builds for the GPU of this machine."""
    if not hasattr(config, "set_compute_capability"):
        return
    members = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    unknown = [capability for capability in wanted if capability not in members]
    if unknown or not wanted:
        raise NotImplementedError(
            f"{trt.__name__} {trt.__version__} cannot build for compute capability "
            f"{', '.join(unknown) or '(none given)'}; choose from {', '.join(members)}"
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(members[capability], index)


def _set_options(trt: Any, config: Any, request: BuildRequest) -> None:
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if request.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib << 20)
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware_compatible is not None:
        _set_hardware_compatibility(trt, config, request.hardware_compatible)
    if request.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _set_hardware_compatibility(trt: Any, config: Any, wanted: str) -> None:
    """Set it and read it back: tensorrt_rtx has the attribute and leaves it as it is, with a warning."""
    level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), wanted.upper(), None)
    if level is not None:
        config.hardware_compatibility_level = level
    if level is None or config.hardware_compatibility_level != level:
        raise NotImplementedError(
            f"{trt.__name__} {trt.__version__} does not build plans that are hardware compatible ({wanted}); leave "
            "hardware_compatible out. With tensorrt_rtx, list the GPUs in compute_capabilities instead"
        )


def _timing_cache(config: Any, request: BuildRequest, notes: list[str]) -> Any | None:
    """The timing cache that the build uses, which must outlive it; None without one."""
    if request.timing_cache is None:
        return None
    if hasattr(config, "set_compute_capability"):  # builds ahead of time, with no GPU to time a tactic on
        notes.append(f"timing_cache is left aside: {request.builder} times no tactics while it builds")
        return None
    path = Path(request.timing_cache)
    path.parent.mkdir(parents=True, exist_ok=True)  # told before the build, not after it
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        notes.append(f"timing_cache {path} was made by another release or for another GPU, so it was started afresh")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep_timing_cache(config: Any, path: Path, notes: list[str]) -> None:
    """Write the timing cache. A failure is no reason to lose the plan, which is written by then."""
    try:
        write_atomically(path, memoryview(config.get_timing_cache().serialize()))
    except OSError as error:
        notes.append(
            f"timing_cache {path} was not kept: {error.strerror}. The plan is whole; the next build times tactics anew"
        )


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _inspect(trt: Any, logger: Any, plan: Any, request: BuildRequest, notes: list[str]) -> list[dict[str, Any]] | None:
    """What the engine inspector tells of each layer: only names, unless the plan was built with details."""
    if not request.inspect:
        return None
    runtime = trt.Runtime(logger)
    if runtime is not None and request.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings its own runtime; this one was made just now
    engine = None if runtime is None else runtime.deserialize_cuda_engine(plan)
    if engine is None:
        notes.append("the engine inspector was not asked: the plan does not load on this machine")
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text).get("Layers", [])
    except ValueError as error:
        notes.append(f"the engine inspector's answer is not valid JSON: {error}")
        return None
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


def _logger(trt: Any, send: Send) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base exists only once the package is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding refuses super()

        def log(self, severity: Any, text: str) -> None:
            send("log", severity.name, text)

    return Logger()


def _monitor(trt: Any, send: Send) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base exists only once the package is imported
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            send("start", phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            send("step", phase, step + 1)
            return True  # the asking process stops a build by ending this one

        def phase_finish(self, phase: str) -> None:
            send("finish", phase)

    return Monitor()
