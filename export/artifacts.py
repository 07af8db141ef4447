"""How an artifact reaches its final name: checked first, then in one step, then with its facts beside it."""

import math
import mmap
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir
import onnxruntime
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]  # protobuf ships no types

from tnm_pipeline.engines.artifact import sha256_of
from tnm_pipeline.engines.manifest import ExternalFile, Manifest, Ranges, TensorSpec
from tnm_pipeline.export.environment import package_versions
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.training.atomic import write_atomically

# The one annotation of torch's exporter that artifacts keep: the torch modules a node came from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
DATA = ".data"  # appended to the name of an ONNX file: the weights that do not fit into it
EXTERNAL_ABOVE = 3 << 29  # 1.5 GiB of weights
_WRITERS = ("tnm-pipeline", "torch", "onnx", "onnxscript")  # what decides the bytes of an ONNX file
_INSIDE = 1 << 10  # bytes; smaller tensors, such as shapes, stay in the graph, where checkers want them


def publish_onnx(model: ir.Model, path: Path, *, run: bool = True, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model that passed the gate: the full checker, a reload, and an ONNX Runtime session.

    Each of the three catches faults that the other two let through.

    Args:
        model: The graph with its weights.
        path: The final name. A model that fails is left beside it as `<name>.rejected`, and what was at `path`
            before stays.
        run: Whether ONNX Runtime's CPU has kernels for this graph, so that a session can be asked for.
        external_above: Bytes of weights from which on they go into `<name>.data` beside the file: protobuf ends at
            2 GiB.

    Raises:
        ExportRejected: A check failed.
        OSError: The folder is missing, read-only or full.
    """
    rejected = path.with_name(path.name + ".rejected")
    if sum(tensor.nbytes for tensor in _weights(model)) > external_above:
        _publish_with_data(model, path, rejected, run=run)
        return
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(content, full_check=True)
        onnx.load_from_string(content)
        if run:
            onnxruntime.InferenceSession(content, _session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the three raise a dozen unrelated classes whose only common base is this
        _remove(rejected)  # which may be a folder, of an earlier, larger model
        write_atomically(rejected, content)
        raise _refusal(path, rejected, error) from error
    write_atomically(path, content)
    path.with_name(path.name + DATA).unlink(missing_ok=True)  # of an earlier, larger model of this name
    _remove(rejected)


def _publish_with_data(model: ir.Model, path: Path, rejected: Path, *, run: bool) -> None:
    """The same for weights beside the file. Both are made and checked in a folder of their own, then moved."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as made:
        draft = Path(made, path.name)
        ir.external_data.unload_from_model(model, made, path.name + DATA, size_threshold_bytes=_INSIDE)
        draft.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(draft, full_check=True)
            onnx.load(draft)
            if run:
                onnxruntime.InferenceSession(draft, _session_options(), providers=["CPUExecutionProvider"])
        except Exception as error:
            _remove(rejected)
            Path(made).replace(rejected)
            Path(made).mkdir()  # for the context manager to remove
            raise _refusal(path, rejected, error) from error
        # A kill between the two leaves the old graph beside new weights: its manifest says so.
        draft.with_name(path.name + DATA).replace(path.with_name(path.name + DATA))
        draft.replace(path)
    _remove(rejected)


def _weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def _refusal(path: Path, rejected: Path, error: Exception) -> ExportRejected:
    return ExportRejected(
        f"{path.name} did not pass the gate: {type(error).__name__}: {error}. "
        f"It was kept as {rejected} for inspection; change the model and export again"
    )


def _remove(rejected: Path) -> None:
    """Remove what an earlier, refused model left: a file, or the folder of one with data beside it."""
    if rejected.is_dir():
        shutil.rmtree(rejected)
    else:
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
        The model, checked against the ONNX specification; weights beside the file are not loaded. Whether a weight has
        exactly the data that its shape says is left to who reads it: asking the checker costs a copy of them all.

    Raises:
        ExportRejected: The file is missing, is not ONNX, or its weights lie outside its folder.
    """
    try:
        model = _parse(path)
        onnx.checker.check_model(_without_weights(model, path.parent))
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise ExportRejected(
            f"{path} is not a readable ONNX file: {error}. Write it again with `tnm-pipeline export`"
        ) from error
    return model


def _parse(path: Path) -> onnx.ModelProto:
    """As `onnx.load` does, without a copy of the file: it takes as long as all the rest."""
    model = onnx.ModelProto()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        model.ParseFromString(view)  # pyright: ignore[reportArgumentType] - typed for bytes, takes any buffer
    return model


def _without_weights(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy whose initializers are empty, and so is what lies in other files, once they are known to be there."""
    light = onnx.ModelProto()
    for part in (field.name for field, _ in model.ListFields() if field.name != "graph"):
        _copy_field(model, light, part)
    for part in (field.name for field, _ in model.graph.ListFields() if field.name != "initializer"):
        _copy_field(model.graph, light.graph, part)
    for tensor in model.graph.initializer:
        light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=[0])
        _check_size(tensor)
        _check_location(tensor, folder)
    for tensor in attribute_tensors([*light.graph.node, *(node for body in light.functions for node in body.node)]):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_location(tensor, folder)
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    return light


def _copy_field(source: Message, target: Message, name: str) -> None:
    value = getattr(source, name)
    if isinstance(value, str | bytes | int):
        setattr(target, name, value)
    else:
        getattr(target, name).MergeFrom(value)


def attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Every tensor that nodes, and the graphs inside them, have as an attribute or initializer."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from graph.initializer
                yield from attribute_tensors(graph.node)


def _check_size(tensor: onnx.TensorProto) -> None:
    """Refuse a shape far beyond the data, before anybody makes room for it."""
    declared = math.prod(tensor.dims)
    inside = tensor.data_location != onnx.TensorProto.EXTERNAL
    # Four numbers of the smallest type fit into a byte. The size of a whole tensor costs twice that of its raw data.
    beyond = inside and declared > 4 * len(tensor.raw_data) and declared > 4 * tensor.ByteSize()
    if beyond or any(side < 0 for side in tensor.dims):
        shape = list(tensor.dims)
        raise ValueError(f"tensor {tensor.name!r} declares shape {shape} and takes {tensor.ByteSize()} bytes in all")


def _check_location(tensor: onnx.TensorProto, folder: Path) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    file = (folder / location).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"tensor {tensor.name!r} has its data in {location!r}, outside the folder of the model")
    if not file.is_file():
        raise ValueError(f"tensor {tensor.name!r} has its data in {location!r}, which is not there")


def tensor_specs(values: Iterable[onnx.ValueInfoProto], profiles: Sequence[Ranges] = ()) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of a graph's inputs or outputs.

    Args:
        values: `graph.input` or `graph.output`.
        profiles: What a plan is built for; empty where any size goes.

    Returns:
        One spec per value, in graph order; its ranges span all profiles.

    Raises:
        ExportRejected: A value is no tensor or has a name that is not text; or, with `profiles` given, one of them has
            no range for a dynamic dimension.
    """
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim_{axis}"
            for axis, dim in enumerate(tensor.shape.dim)
        )
        if not all(isinstance(name, str | int) for name in (value.name, *shape)):  # protobuf then gives bytes
            raise ExportRejected(
                f"input or output {value.name!r} of shape {shape} has a name that is not UTF-8; write the file again "
                "with the tool it came from"
            )
        dynamic = [size for size in shape if isinstance(size, str)]
        ranges = {dim: _span(value.name, dim, profiles) for dim in dynamic} if profiles else {}
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        except KeyError:  # 0 for what is no tensor, such as a sequence
            raise ExportRejected(
                f"input or output {value.name!r} has element type {tensor.elem_type}, which is none of a tensor: "
                "only tensors of ONNX's types go in and out of an artifact"
            ) from None
        specs.append(TensorSpec(value.name, dtype, shape, ranges))
    return tuple(specs)


def _span(name: str, dim: str, profiles: Sequence[Ranges]) -> tuple[int, int, int]:
    if any(dim not in profile for profile in profiles):
        raise ExportRejected(
            f"dimension {dim!r} of {name!r} is dynamic, and a plan needs (min, opt, max) sizes of it in every profile, "
            f"such as {{{dim!r}: (1, 8, 64)}}; or export with a fixed size there"
        )
    low = min(profile[dim][0] for profile in profiles)
    high = max(profile[dim][2] for profile in profiles)
    return low, profiles[0][dim][1], high


def onnx_manifest(
    path: Path,
    *,
    precision: str,
    sparsity: Mapping[str, object],
    provenance: Mapping[str, object] = MappingProxyType({}),
) -> Manifest:
    """The facts of an ONNX artifact, ready for `engines.manifest.write_manifest`.

    Args:
        path: A file that `publish_onnx` wrote.
        precision: `"fp32"`, `"fp16"` or `"bf16"`: the type of its weights.
        sparsity: `SparsityReport.summary()` of the same file.
        provenance: What else is known of where it comes from, besides the versions of packages, which are added.

    Returns:
        The manifest; equal files, facts and versions give equal manifests.

    Raises:
        ExportRejected: The file is not ONNX.
    """
    graph = read_onnx(path).graph
    data = path.with_name(path.name + DATA)
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
        external=(ExternalFile(data.name, sha256_of(data), data.stat().st_size),) if data.is_file() else (),
        provenance={**provenance, "packages": package_versions(*_WRITERS)},
    )
