"""A torch module to one ONNX file: named dynamic dimensions, parameter names kept, the same bytes every time."""

import ast
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tnm_pipeline.export.artifacts import EXTERNAL_ABOVE, NAME_SCOPES, publish_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.signature import (
    Signature,
    by_keyword,
    call,
    named,
    named_outputs,
    signature_of,
    spelled_out,
    to_trace,
)
from tnm_pipeline.training.convert.batch import Batch

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def export_onnx(
    model: nn.Module,
    samples: Tensor | Sequence[Batch],
    path: Path,
    *,
    opset: int = 20,
    external_above: int = EXTERNAL_ABOVE,
) -> Signature:
    """Export a module in eval mode; its parameters are not copied and its training flags are restored.

    Dimensions vary as the samples do, see `signature_of`. Batch norms after a convolution are folded into it. An
    initializer carries its torch parameter's name; where a `Linear` on a 3-D input became `MatMul`, the name stays and
    the storage is the transpose (I, O).

    Args:
        model: On the CPU, returning tensors: one, or a tuple or dictionary of them.
        samples: One or more calls' inputs; their values do not matter. Give several of different sizes where other
            dimensions than the batch vary.
        path: The file to write; its folder exists.
        opset: ONNX opset; from 23 on the exporter emits `Attention`, which breaks fp32 TensorRT-RTX builds.
        external_above: Bytes of weights from which on they are written beside the file, as `<name>.data`.

    Returns:
        The inputs with the dimensions that vary.

    Raises:
        ExportRejected: A weight is not finite or not on the CPU; a weight or an output is in half precision; torch
            cannot trace the module, or a dimension that varies in the samples does not in the module; or the file
            fails the gate of `publish_onnx`.
        OSError: The folder is missing, read-only or full.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _check_state(state)
    batches = [named(model, batch) for batch in ([samples] if isinstance(samples, Tensor) else samples)]
    signature = signature_of(batches)
    traced = to_trace(batches, signature)
    with _eval_mode(model), _quiet(), spelled_out(model, traced):
        outputs = named_outputs(_run(model, traced))
        _check_not_half("output", outputs)
        program = _trace(model, traced, signature, list(outputs), opset)
        _check_dimensions(program.model.graph, model, traced, signature)
    _restore_names(program.model.graph, state)
    _strip_metadata(program.model)
    publish_onnx(program.model, path, external_above=external_above)
    return signature


def _trace(
    model: nn.Module, traced: Mapping[str, Tensor], signature: Signature, outputs: list[str], opset: int
) -> torch.onnx.ONNXProgram:
    dims: dict[str, Any] = {}
    dynamic = {
        name: {
            axis: dims.setdefault(dim, torch.export.Dim(dim)) for axis, dim in enumerate(shape) if isinstance(dim, str)
        }
        for name, shape in signature.shapes.items()
    }
    keywords = by_keyword(model, traced)
    try:
        program = torch.onnx.export(
            model,
            () if keywords else tuple(traced.values()),
            kwargs=dict(traced) if keywords else None,
            dynamo=True,
            dynamic_shapes=dynamic if keywords else tuple(dynamic.values()),
            opset_version=opset,
            input_names=list(traced),
            output_names=outputs,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportRejected(_why_not(model, traced, signature, error)) from error
    assert program is not None  # only the TorchScript exporter returns None
    return program


def _run(model: nn.Module, batch: Mapping[str, Tensor]) -> object:
    try:
        return call(model, batch)
    except Exception as error:  # the user's own code, which may raise anything
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        raise ExportRejected(
            f"{type(model).__name__}.forward() fails on the sample {shapes}{_place(error)}: "
            f"{type(error).__name__}: {error}. Correct that first"
        ) from error


def _why_not(model: nn.Module, traced: Mapping[str, Tensor], signature: Signature, error: Exception) -> str:
    """What torch said, with the line of the model where it happened."""
    cause = error.__cause__ or error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).strip().partition("\n")[0]
    pinned = _pinned(model, traced, signature)
    shapes = {name: tuple(tensor.shape) for name, tensor in traced.items()}
    return f"torch cannot export {type(model).__name__} with inputs {shapes}{_place(cause)}: {reason}. " + (
        pinned or "forward() must do the same for all data of these shapes: remove control flow that depends on values"
    )


def _check_dimensions(graph: ir.Graph, model: nn.Module, traced: Mapping[str, Tensor], signature: Signature) -> None:
    """Refuse a dimension that forward() pins down, such as by `x.reshape(2, -1)`: the exporter says nothing."""
    for value in graph.inputs:
        assert value.name is not None  # an input that torch traced has a name and a shape
        assert value.shape is not None
        for axis, dim in enumerate(signature.shapes[value.name]):
            if isinstance(dim, str) and isinstance(size := value.shape[axis], int):
                raise ExportRejected(
                    f"{type(model).__name__}.forward() works only for {dim} = {size}, dimension {axis} of "
                    f"{value.name!r}. " + _pinned(model, traced, signature)
                )


def _pinned(model: nn.Module, traced: Mapping[str, Tensor], signature: Signature) -> str:
    """The line at which forward() fails with other sizes than those traced, and what to do; empty if it does not."""
    for dim in dict.fromkeys(dim for shape in signature.shapes.values() for dim in shape if isinstance(dim, str)):
        larger = {name: _one_more(tensor, signature.shapes[name], dim) for name, tensor in traced.items()}
        try:
            call(model, larger)
        except Exception as error:  # the user's own code, which may raise anything
            return f"It fails with one more of {dim}{_place(error)}: use the tensor's own sizes there, x.shape"
    with _Fixing() as fixing:
        call(model, traced)
    return f"{fixing.first}: write x.shape[0], which can vary" if fixing.first else ""


class _Fixing(TorchFunctionMode):
    """Notes the first `len(x)` of a forward pass: it makes a Python integer, which a tracer takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__len__ and not self.first:
            frames = _users(traceback.extract_stack())
            self.first = f"It calls len(){_at(frames)}" if frames else ""
        return func(*args, **(kwargs or {}))


def _one_more(tensor: Tensor, shape: tuple[int | str, ...], dim: str) -> Tensor:
    for axis, name in enumerate(shape):
        if name == dim:
            tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    return tensor


def _place(error: BaseException) -> str:
    """The innermost line that is not of torch: `` at model.py:12, in forward``."""
    return _at(_users(traceback.extract_tb(error.__traceback__)))


def _users(frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Those of neither torch nor this package."""
    library = str(Path(torch.__file__).parent)
    outside = [frame for frame in frames if not frame.filename.startswith(library)]
    return [frame for frame in outside if Path(frame.filename).resolve().parent != Path(__file__).resolve().parent]


def _at(frames: Sequence[traceback.FrameSummary]) -> str:
    return f" at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _check_state(state: Mapping[str, Tensor]) -> None:
    elsewhere = sorted({str(tensor.device) for tensor in state.values() if tensor.device.type != "cpu"})
    if elsewhere:
        raise ExportRejected(f"weights are on {', '.join(elsewhere)}; move them with model.cpu() first")
    _check_not_half("tensor", state)
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ExportRejected(
            f"{len(broken)} tensors hold NaN or infinity, first {', '.join(broken[:5])}; "
            "go back to the last checkpoint whose loss was finite"
        )


def _check_not_half(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what the file's precision, fp32, would be wrong for."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize:
            raise ExportRejected(
                f"{kind} {name!r} is {tensor.dtype}, and a model is exported in float32: call model.float() first; "
                "export.precisions makes the half files"
            )


def _restore_names(graph: ir.Graph, state: Mapping[str, Tensor]) -> None:
    """Give a transposed, nameless weight (`val_14`) its parameter's name, if it is exactly that transpose."""
    for value in list(graph.initializers.values()):
        sources = ast.literal_eval(value.metadata_props.get(_FOLDED_FROM, "[]"))
        parameter = state.get(sources[0]) if len(sources) == 1 else None
        # A tied weight (an embedding that is also the head) already occupies the name in its own layout.
        if parameter is None or parameter.ndim != 2 or sources[0] in graph.initializers:
            continue
        assert value.const_value is not None  # it is an initializer
        if np.array_equal(value.const_value.numpy(), parameter.numpy().T):
            value.name = sources[0]


def _strip_metadata(model: ir.Model) -> None:
    """Keep `NAME_SCOPES` alone: stack traces name the exporting machine's folders and would change the hash."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            scopes = node.metadata_props.get(NAME_SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[NAME_SCOPES] = scopes
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the messages that torch's exporter gives about itself, or of dimensions that share a name, and no others."""

    def about_models(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(about_models)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        logger.removeFilter(about_models)
