"""What a model is asked when it is exported and verified: the calls that its task, or its calibration data, makes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tnm_pipeline.engines import TensorSpec, load
from tnm_pipeline.engines.manifest import Ranges
from tnm_pipeline.export.cpu_session import open_emulated
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.signature import BATCH, call, named, named_outputs
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.conversion import calibration_batches
from tnm_pipeline.pipeline.learn import data_of
from tnm_pipeline.training.convert.batch import Batch, attended, forward
from tnm_pipeline.training.tasks import Task, TaskError

Arrays = dict[str, NDArray[Any]]
Ask = Callable[[nn.Module], Tensor | None]
"""Asks a model about one batch; returns its predictions, None where there is no task."""

_EXAMPLES = 8  # in a sample call


class Graph(Protocol):
    """Something loaded that answers: a session, or an emulation where no runtime here has the kernels."""

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        ...


class EmulatedGraph:
    """A graph in a half precision on the CPU, see `tnm_pipeline.export.precision.emulated`."""

    def __init__(self, path: Path) -> None:
        self._session = open_emulated(path)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        answers: Any = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, answers, strict=True))


def emulates(precision: str) -> bool:
    """Whether `open_graph` emulates this precision."""
    return precision != "fp32"


@contextmanager
def open_graph(path: Path, precision: str) -> Iterator[Graph]:
    """Load an ONNX artifact on the CPU: fp32 as production would, a half precision as a GPU would compute it.

    ONNX Runtime's CPU has no bf16, and computes fp16 graphs in float32 (seen with 1.31): what overflows or cancels in
    fp16 would pass there.
    """
    if emulates(precision):
        yield EmulatedGraph(path)
        return
    with load(path, device="cpu") as session:
        yield session


class Recorder(nn.Module):
    """A model that remembers its last call.

    Attributes:
        inputs: By name.
        outputs: By name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def forward(self, *tensors: Tensor, **keywords: Tensor) -> Any:
        """Answer like the model."""
        self.inputs = _named(self.model, tensors, keywords)
        result = self.model(*tensors, **keywords)
        self.outputs = named_outputs(result)
        return result


class Answerer(nn.Module):
    """An artifact in a model's place.

    Attributes:
        outputs: Of its last call, by name.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.outputs: Arrays = {}
        self._model = [model]  # in a list: torch would take its parameters for those of this module

    def forward(self, *tensors: Tensor, **keywords: Tensor) -> Any:
        """Answer with the artifact's outputs: one tensor, or an object that has them by name."""
        feeds = {name: tensor.numpy() for name, tensor in _named(self._model[0], tensors, keywords).items()}
        self.outputs = self.graph.run(feeds)
        tensors = tuple(torch.from_numpy(array) for array in self.outputs.values())
        return tensors[0] if len(tensors) == 1 else SimpleNamespace(**dict(zip(self.outputs, tensors, strict=True)))


def sample_calls(config: Config, model: nn.Module) -> list[dict[str, Tensor]]:
    """A few calls' inputs by name, of different sizes where the data's sizes differ, and always of several lengths."""
    asks = list(_examples(config)) if config.labelled else _three(list(asked(config)))
    calls = [_inputs(model, ask) for ask in asks]
    mask = calls[0].get("attention_mask")
    if mask is not None and mask.dim() == 2 and len({call["attention_mask"].shape[1] for call in calls}) == 1:
        calls.insert(0, _of_another_length(model, calls[0], mask.shape))
    return calls


def asked(config: Config) -> Iterator[Ask]:
    """All there is to ask: the test set where there are labels, the calibration data where there are none."""
    if not config.labelled:
        for batch in calibration_batches(config):
            yield _passing(batch)
        return
    data = data_of(config)
    size = data.task.at_once
    for start in range(0, len(data.test), size):
        yield _predicting(data.task, data.test[start : start + size])


def real_tokens(inputs: Mapping[str, Tensor]) -> NDArray[np.bool_] | None:
    """(B, T), False where a token is padding; None where there is no padding."""
    mask = attended(inputs)
    return None if mask is None else mask.numpy()


def resized(inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec], batch: int, ranges: Ranges) -> Arrays:
    """A call with so many entries in the batch, and other dimensions within what a plan takes.

    Args:
        inputs: A call's inputs by name.
        specs: The artifact's.
        batch: How many entries: those there are, over and over.
        ranges: Of one profile of a plan; a dimension that it does not name keeps its size.
    """
    arrays: Arrays = {}
    for spec in specs:
        array = inputs[spec.name].numpy()
        for axis, dim in enumerate(spec.shape):
            size = array.shape[axis]
            if dim == BATCH:
                size = batch
            elif isinstance(dim, str) and dim in ranges:
                low, _, high = ranges[dim]
                size = min(max(size, low), high)
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
        arrays[spec.name] = array
    return arrays


def _examples(config: Config) -> Iterator[Ask]:
    """Where samples have lengths, the shortest, the middle and the longest; else the first."""
    data = data_of(config)
    *tensors, _ = data.test.tensors
    lengths = data.task.lengths(tensors)
    if lengths is None:
        yield _predicting(data.task, data.test[:_EXAMPLES])
        return
    order = lengths.argsort(stable=True)
    middle = max(0, (len(order) - _EXAMPLES) // 2)
    for chosen in (order[:_EXAMPLES], order[middle : middle + _EXAMPLES], order[-_EXAMPLES:]):
        yield _predicting(data.task, data.test[chosen])


def _three(asks: Sequence[Ask]) -> list[Ask]:
    """The first, the middle and the last: calibration batches come sorted by their length, if they have one."""
    return [asks[index] for index in sorted({0, len(asks) // 2, len(asks) - 1})]


def _of_another_length(model: nn.Module, inputs: Mapping[str, Tensor], tokens: torch.Size) -> dict[str, Tensor]:
    """With more padding, or, at the encoder's limit, fewer tokens: a length shall not be fixed because all have it."""
    for change in (_EXAMPLES, -(tokens[1] // 2)):
        other = {
            name: functional.pad(tensor, (0, change)) if tensor.shape == tokens else tensor
            for name, tensor in inputs.items()
        }
        try:
            call(model, other)
        except Exception:  # noqa: S112  # forward() is the user's own code, which may raise anything
            continue
        return other
    return dict(inputs)


def _passing(batch: Batch) -> Ask:
    def ask(model: nn.Module) -> None:
        forward(model, batch)

    return ask


def _predicting(task: Task, batch: Sequence[Tensor]) -> Ask:
    return lambda model: task.predict(model, batch[:-1])


@torch.no_grad()
def _inputs(model: nn.Module, ask: Ask) -> dict[str, Tensor]:
    recorder = Recorder(model)
    try:
        ask(recorder)
    except (TaskError, ExportRejected, MemoryError):
        raise
    except Exception as error:  # forward() is the user's own code, which may raise anything
        shapes = {name: tuple(tensor.shape) for name, tensor in recorder.inputs.items()}
        raise ExportRejected(
            f"{type(model).__name__} does not take the data's inputs {shapes}: {type(error).__name__}: {error}. "
            "Give data that it takes"
        ) from error
    return {name: tensor[:_EXAMPLES] for name, tensor in recorder.inputs.items()}


def _named(model: nn.Module, tensors: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return named(model, keywords or (tensors[0] if len(tensors) == 1 else tensors))
