"""ONNX models that were made in memory, in ONNX Runtime on the CPU: also those that protobuf has no room for."""

import os
import tempfile
from pathlib import Path

import onnx
import onnxruntime
from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

from tnm_pipeline.export.artifacts import EXTERNAL_ABOVE, attribute_tensors
from tnm_pipeline.export.precision import emulated

_FILE = "weights"


def open_emulated(source: Path, *, external_above: int = EXTERNAL_ABOVE) -> onnxruntime.InferenceSession:
    """A session of a half graph that computes as a GPU would, see `tnm_pipeline.export.precision.emulated`.

    Args:
        source: What `retype` wrote.
        external_above: Bytes of weights from which on they go through a temporary file: as float32 they are twice as
            large as in `source`.

    Raises:
        ExportRejected: See `emulated`.
        OSError: The folder for temporary files is full.
    """
    model = emulated(source)
    if weight_bytes(model) <= external_above:
        return open_session(model, None, onnxruntime.SessionOptions())
    with tempfile.TemporaryDirectory() as made:  # ONNX Runtime has the weights in memory once the session is open
        unload(model, Path(made))
        return open_session(model, Path(made), onnxruntime.SessionOptions())


def open_session(
    model: onnx.ModelProto, folder: Path | None, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: Below 2 GiB, apart from external weights.
        folder: Where those lie; None where there are none, so that none is looked for in the working directory.
        options: Of the session, which are completed.
    """
    weights = os.devnull if folder is None else str(folder)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the weights that lie inside a model. Protobuf cannot tell the size of one that is too large for it."""
    return sum(len(tensor.raw_data) for tensor in (*model.graph.initializer, *attribute_tensors(model.graph.node)))


def unload(model: onnx.ModelProto, folder: Path) -> None:
    """Move the weights of a model, in place, into a file in an empty folder."""
    convert_model_to_external_data(model, location=_FILE)
    write_external_data_tensors(model, str(folder))
