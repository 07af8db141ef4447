"""ONNX files that come without a manifest, and inputs made up for them."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tnm_pipeline.engines import ArtifactRejected, TensorSpec
from tnm_pipeline.export.artifacts import read_onnx, tensor_specs
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.pipeline.errors import ConfigError

Arrays = Mapping[str, NDArray[Any]]

_SEVERITY_ERROR = 3


class ForeignSession:
    """Anybody's ONNX file in ONNX Runtime on the CPU, with nothing known of it but the file.

    Args:
        path: The file.

    Raises:
        ExportRejected: It is not ONNX, or ONNX Runtime refuses it.
    """

    device = "cpu"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # The pass crashes the process on fp16 transformers, see engines/backends/onnxruntime.py.
            skipped = ["NchwcTransformer"] if _holds_fp16(read_onnx(path).graph) else None
            options = onnxruntime.SessionOptions()
            options.log_severity_level = _SEVERITY_ERROR
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped
            )
        except ExportRejected:
            raise
        except Exception as error:  # ONNX Runtime's classes have no base but this
            raise ExportRejected(
                f"ONNX Runtime {onnxruntime.__version__} refuses {path}: {error}. Run it where its operators are known"
            ) from error

    def run(self, feeds: Arrays, /) -> dict[str, NDArray[Any]]:
        """Answer one call.

        Raises:
            ExportRejected: The network cannot answer these inputs.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            answers: Sequence[Any] = self._session.run(names, dict(feeds))
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in feeds.items())
            raise ExportRejected(
                f"{self._path.name} fails on made-up inputs ({shapes}): {error}. Give sizes that fit together"
            ) from error
        return dict(zip(names, answers, strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session


def inputs_of(path: Path) -> tuple[TensorSpec, ...]:
    """What a call must give: the graph's inputs, but for weights that old files list among them.

    Raises:
        ExportRejected: It is not ONNX, or states what no input can be.
    """
    graph = read_onnx(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    try:
        return tensor_specs(value for value in graph.input if value.name not in weights)
    except (ArtifactRejected, ExportRejected) as error:
        raise ExportRejected(f"{path}: {error}. Write it again with the tool it came from") from error


def named_sizes(
    path: Path, specs: Sequence[TensorSpec], given: Sequence[str], defaults: Mapping[str, int]
) -> dict[str, int]:
    """The size of every dimension that has a name.

    Args:
        path: What a message calls the file.
        specs: Its inputs.
        given: `NAME=N`, as on the command line.
        defaults: What holds for those that are not given.

    Raises:
        ConfigError: One is neither given nor has a default, one is unknown, or not NAME=N.
    """
    chosen = dict(_named_size(text) for text in given)
    names = sorted({side for spec in specs for side in spec.shape if isinstance(side, str)})
    if unknown := sorted(set(chosen) - set(names)):
        known = f"it has {', '.join(names)}" if names else "all its dimensions are fixed"
        raise ConfigError(f"{path.name} has no dimension {', '.join(unknown)}: {known}")
    chosen = {**defaults, **chosen}
    if missing := [name for name in names if name not in chosen]:
        options = " ".join(f"--size {name}=N" for name in missing)
        raise ConfigError(f"{path.name} leaves {', '.join(missing)} open: say how large, by {options}")
    return {name: chosen[name] for name in names}


def made_up(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Gaussian numbers, and zeros and ones for whole ones, which are valid tokens, masks and positions alike.

    Args:
        specs: The inputs.
        sizes: Of every dimension that has a name.

    Raises:
        ConfigError: They are too large for the memory, or for any.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in specs:
        shape = [sizes[side] if isinstance(side, str) else side for side in spec.shape]
        fractional = np.issubdtype(np.dtype(spec.dtype), np.floating)
        try:
            _check_memory(8 * math.prod(shape))
            drawn = rng.standard_normal(shape) if fractional else rng.integers(0, 2, shape)
            arrays[spec.name] = np.asarray(drawn, spec.dtype)
        except MemoryError as error:
            raise ConfigError(
                f"an array of {'x'.join(map(str, shape))} numbers cannot be made for {spec.name}: {error}. "
                "Give smaller sizes or batches"
            ) from error
    return arrays


def _check_memory(needed: int) -> None:
    """Refuse what the system would promise, and then end the process for."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise MemoryError(f"they take {needed / 2**30:,.0f} GiB, and the machine has {there / 2**30:,.0f}")


def _named_size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"--size {text}: write NAME=N, such as sequence=128")
    return name, int(size)


def _holds_fp16(graph: onnx.GraphProto) -> bool:
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in graph.input}
    return onnx.TensorProto.FLOAT16 in types
