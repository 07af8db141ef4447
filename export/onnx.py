"""A torch module to one ONNX file: dynamic batch, parameter names kept, the same bytes every time."""

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tnm_pipeline.export.artifacts import NAME_SCOPES, publish_onnx
from tnm_pipeline.export.errors import ExportRejected

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_MAX_BYTES = 2**31 - 2**24  # protobuf's 2 GiB limit, less room for the graph itself


def export_onnx(
    model: nn.Module,
    sample: Tensor,
    path: Path,
    *,
    opset: int = 20,
    input_name: str = "input",
    output_name: str = "output",
) -> None:
    """Export a module in eval mode; its parameters are not copied and its training flags are restored.

    Dimension 0 of input and output becomes `"batch"`. Batch norms after a convolution are folded into it. An
    initializer carries its torch parameter's name; where a `Linear` on a 3-D input became `MatMul`, the name stays and
    the storage is the transpose (I, O).

    Args:
        model: On the CPU, taking one tensor and returning one.
        sample: A valid input, shape (batch, ...); values do not matter.
        path: The file to write; its folder exists.
        opset: ONNX opset; from 23 on the exporter emits `Attention`, which breaks fp32 TensorRT-RTX builds.
        input_name: Name of the graph's input.
        output_name: Name of the graph's output.

    Raises:
        ExportRejected: A weight is not finite, not on the CPU, or too large for one file; torch cannot trace
            the module with a dynamic batch; or the file fails the gate of `publish_onnx`.
        OSError: The folder is missing, read-only or full.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _check_state(state)
    # torch.export specialises a dimension of size 1 to the constant 1.
    traced = sample.repeat(2, *[1] * (sample.ndim - 1)) if sample.shape[0] == 1 else sample
    with _eval_mode(model), _quiet():
        try:
            program = torch.onnx.export(
                model,
                (traced,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                input_names=[input_name],
                output_names=[output_name],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().partition("\n")[0]
            raise ExportRejected(
                f"torch cannot export {type(model).__name__} with input {tuple(traced.shape)}: {reason}. "
                "forward() must do the same for every batch: remove control flow that depends on data"
            ) from error
    assert program is not None  # only the TorchScript exporter returns None
    _check_batch(program.model.graph.inputs[0], type(model).__name__)
    _restore_names(program.model.graph, state)
    _strip_metadata(program.model)
    publish_onnx(ir.to_proto(program.model), path)


def _check_state(state: Mapping[str, Tensor]) -> None:
    elsewhere = sorted({str(tensor.device) for tensor in state.values() if tensor.device.type != "cpu"})
    if elsewhere:
        raise ExportRejected(f"weights are on {', '.join(elsewhere)}; move them with model.cpu() first")
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ExportRejected(
            f"{len(broken)} tensors hold NaN or infinity, first {', '.join(broken[:5])}; "
            "go back to the last checkpoint whose loss was finite"
        )
    size = sum(tensor.nbytes for tensor in state.values())
    if size > _MAX_BYTES:
        raise ExportRejected(
            f"the weights take {size / 2**30:.2f} GiB and one ONNX file holds less than 2 GiB; "
            "export the model in parts, or in half precision"
        )


def _check_batch(value: ir.Value, model: str) -> None:
    """Refuse a batch that forward() pins down, such as by `x.reshape(2, -1)`: the exporter says nothing."""
    assert value.shape is not None  # an input that torch traced has a shape
    if isinstance(value.shape[0], int):
        raise ExportRejected(
            f"{model}.forward() works only for a batch of {value.shape[0]}: it uses a fixed size instead "
            "of x.shape[0]. Change that"
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
    """Drop the two messages that torch's exporter gives about itself, on every model, and no others."""

    def about_models(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(about_models)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logger.removeFilter(about_models)
