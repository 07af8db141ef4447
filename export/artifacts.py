"""How an artifact reaches its final name: checked first, then in one step, then with its facts beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from tnm_pipeline.engines.artifact import sha256_of
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.training.atomic import write_atomically

# The one annotation of torch's exporter that artifacts keep: the torch modules a node came from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def publish_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model that passed the gate: the full checker, a reload, and an ONNX Runtime session.

    Each of the three catches faults that the other two let through.

    Args:
        model: The graph with its weights inside, below protobuf's limit of 2 GiB.
        path: The final name. A model that fails is left beside it as `<name>.rejected`, and what was at
            `path` before stays.

    Raises:
        ExportRejected: A check failed.
        OSError: The folder is missing, read-only or full.
    """
    content = model.SerializeToString(deterministic=True)
    rejected = path.with_name(path.name + ".rejected")
    try:
        onnx.checker.check_model(content, full_check=True)
        onnx.load_from_string(content)
        onnxruntime.InferenceSession(content, _session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the three raise a dozen unrelated classes whose only common base is this
        write_atomically(rejected, content)
        raise ExportRejected(
            f"{path.name} did not pass the gate: {type(error).__name__}: {error}. "
            f"The file was kept as {rejected} for inspection; change the model and export again"
        ) from error
    write_atomically(path, content)
    rejected.unlink(missing_ok=True)


def _session_options() -> onnxruntime.SessionOptions:
    """All optimisations but those of the CPU's memory layout: they crash the process on fp16 transformers.

    Seen with ONNX Runtime 1.31: its NCHWc pass faults on valid graphs after it inserted casts to fp32.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


def read_onnx(path: Path) -> onnx.ModelProto:
    """Load an ONNX file that someone else may have written.

    Args:
        path: A file with its weights inside or in the same folder.

    Returns:
        The model, checked against the ONNX specification.

    Raises:
        ExportRejected: The file is missing, is not ONNX, or its weights lie outside its folder.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(path)
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise ExportRejected(
            f"{path} is not a readable ONNX file: {error}. Write it again with `tnm-pipeline export`"
        ) from error
    return model


def tensor_specs(
    values: Iterable[onnx.ValueInfoProto], batch: tuple[int, int, int] | None = None
) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of a graph's inputs or outputs.

    Args:
        values: `graph.input` or `graph.output`.
        batch: (min, opt, max) of the dynamic dimension 0; None where any size goes.

    Returns:
        One spec per value, in graph order.

    Raises:
        ExportRejected: With `batch` given, another dimension than the first is dynamic.
    """
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape: list[int | str] = []
        for axis, dim in enumerate(tensor.shape.dim):
            static = dim.HasField("dim_value")
            shape.append(dim.dim_value if static else dim.dim_param or f"{value.name}_dim_{axis}")
            if not static and axis > 0 and batch is not None:
                raise ExportRejected(
                    f"dimension {axis} ({shape[-1]!r}) of {value.name!r} is dynamic; a plan can vary only "
                    "dimension 0, the batch. Export with fixed sizes in the other dimensions"
                )
        dynamic = shape[0] if shape else None
        ranges = {dynamic: batch} if isinstance(dynamic, str) and batch is not None else {}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        specs.append(TensorSpec(value.name, dtype, tuple(shape), ranges))
    return tuple(specs)


def onnx_manifest(path: Path, *, precision: str, sparsity: Mapping[str, object]) -> Manifest:
    """The facts of an ONNX artifact, ready for `engines.manifest.write_manifest`.

    Args:
        path: A file that `publish_onnx` wrote.
        precision: `"fp32"` or `"fp16"`: the type of its weights.
        sparsity: `SparsityReport.summary()` of the same file.

    Returns:
        The manifest; equal files give equal manifests.

    Raises:
        ExportRejected: The file is not ONNX.
    """
    graph = read_onnx(path).graph
    return Manifest(
        artifact=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        backend="onnxruntime",
        backend_version=onnx.__version__,
        precision=precision,
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        source_onnx=None,
        source_sha256=None,
        sparse_weights_flag=None,
        compute_capabilities=(),
        gpu=None,
        driver=None,
        sparsity=sparsity,
    )
