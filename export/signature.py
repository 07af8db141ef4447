"""Which inputs and outputs a model has, and which of their dimensions vary: read off sample data."""

import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.engines.manifest import Ranges
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.training.convert.batch import Batch

BATCH = "batch"
_SINGLE = "input"  # the name of an input that its caller did not name

_BY_NAME_ALONE = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
_AXES = {(2, 1): "sequence", (3, 1): "sequence", (4, 2): "height", (4, 3): "width"}  # (rank, axis) -> customary name


@dataclass(frozen=True)
class Signature:
    """A model's inputs.

    Attributes:
        shapes: Input name -> per dimension its size, or the name of one that varies.
        ranges: Dimension that varies, the batch apart -> its (smallest, median, largest) size in the samples.
    """

    shapes: Mapping[str, tuple[int | str, ...]]
    ranges: Ranges


def named(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch by input name: a single tensor is `input`, those of a sequence are called as forward() calls them.

    Args:
        model: Whose forward() takes the batch.
        batch: In any of the three forms.

    Raises:
        ExportRejected: No tensors, more than forward() takes, or a name that it does not have.
    """
    if isinstance(batch, Tensor):
        return {_SINGLE: batch}
    if not isinstance(batch, Mapping):
        parameters = list(inspect.signature(model.forward).parameters)
        if len(batch) > len(parameters):
            raise ExportRejected(
                f"{type(model).__name__}.forward() takes {len(parameters)} inputs ({', '.join(parameters)}), and the "
                f"sample has {len(batch)}: give it as many"
            )
        batch = dict(zip(parameters, batch, strict=False))
    if not batch or not all(isinstance(tensor, Tensor) for tensor in batch.values()):
        kinds = {name: type(tensor).__name__ for name, tensor in batch.items()}
        raise ExportRejected(f"a sample is one tensor for each input, not {kinds or 'nothing'}")
    if by_keyword(model, batch):
        _check_names(model, batch)
    return dict(batch)


def signature_of(batches: Sequence[Mapping[str, Tensor]]) -> Signature:
    """Find the dimensions that vary: the batch, and any whose size differs between the samples.

    Dimension 0 is the batch in every input that has as many entries as the first. Dimensions of different inputs that
    have one size in every sample, such as the tokens and their mask, are one dimension.

    Args:
        batches: One or more calls' inputs, names and ranks the same in all.

    Raises:
        ExportRejected: Names, ranks or dtypes differ between samples.
    """
    first = batches[0]
    described = {name: (tensor.dim(), tensor.dtype) for name, tensor in first.items()}
    for batch in batches[1:]:
        other = {name: (tensor.dim(), tensor.dtype) for name, tensor in batch.items()}
        if other != described:
            raise ExportRejected(f"samples differ in names, ranks or dtypes: {described} and {other}; make them alike")
    entries = next(iter(first.values())).shape[:1]
    shapes: dict[str, tuple[int | str, ...]] = {}
    taken: dict[str, list[int]] = {}  # name of a dimension that varies -> its sizes, sample by sample
    for name, tensor in first.items():
        here: list[int | str] = []
        for axis in range(tensor.dim()):
            sizes = [batch[name].shape[axis] for batch in batches]
            if axis == 0 and tensor.shape[:1] == entries:
                here.append(BATCH)
            elif len(set(sizes)) == 1:
                here.append(sizes[0])
            else:
                here.append(_name(name, tensor.dim(), axis, sizes, taken, here))
        shapes[name] = tuple(here)
    ranges = {dim: (min(sizes), statistics.median_low(sizes), max(sizes)) for dim, sizes in taken.items()}
    return Signature(shapes, ranges)


def _name(
    name: str, rank: int, axis: int, sizes: list[int], taken: dict[str, list[int]], here: Sequence[int | str]
) -> str:
    """The name of a dimension of another input that varies alike, or a new one. Those of one input stay apart."""
    for dim, known in taken.items():
        if known == sizes and dim not in here:
            return dim
    customary = _AXES.get((rank, axis), "")
    dim = customary if customary and customary not in taken else f"{name}_dim_{axis}"
    taken[dim] = sizes
    return dim


def to_trace(batches: Sequence[Mapping[str, Tensor]], signature: Signature) -> dict[str, Tensor]:
    """The sample to trace: the largest one, with two entries at least, since tracers take a size of 1 for a constant.

    Args:
        batches: One or more calls' inputs.
        signature: Theirs.
    """
    chosen = max(batches, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
    entries = next(iter(chosen.values())).shape[:1]
    if entries != (1,):
        return dict(chosen)
    repeated = {}
    for name, tensor in chosen.items():
        times = 2 if signature.shapes[name][:1] == (BATCH,) else 1
        repeated[name] = tensor.repeat(times, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
    return repeated


def named_outputs(result: object) -> dict[str, Tensor]:
    """What forward() returned, by name and in the order in which the exporter sees it.

    A tensor is `output`; entries of a dictionary, or of an output of transformers, keep their keys; those of a tuple
    are numbered. None is left out.

    Raises:
        ExportRejected: Something else than tensors, or nothing.
    """
    found = dict(_leaves("", result))
    if not found:
        raise ExportRejected("forward() returns no tensor: there is nothing to export")
    return found


def _leaves(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(f"{name}_{key}" if name else str(key), entry)
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _leaves(f"{name or 'output'}_{index}", entry)
    elif value is not None:
        raise ExportRejected(
            f"forward() returns a {type(value).__name__}{f' as {name}' if name else ''}, and a graph returns tensors: "
            "return a tensor, a tuple or a dictionary of tensors (of transformers: model.config.use_cache = False)"
        )


@torch.no_grad()
def call(model: nn.Module, batch: Mapping[str, Tensor]) -> object:
    """Run the model on one batch that `named` made: by keyword, unless its only tensor has no name of its own."""
    return model(**batch) if by_keyword(model, batch) else model(*batch.values())


def by_keyword(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether names are passed to forward(): all but a single `input` that it calls otherwise."""
    parameters = inspect.signature(model.forward).parameters
    if list(batch) != [_SINGLE] or _SINGLE in parameters:
        return True
    return all(parameter.kind in _BY_NAME_ALONE for parameter in parameters.values())


@contextmanager
def spelled_out(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a forward() that takes inputs by any name say which it gets: torch 2.13 cannot let their sizes vary."""
    inner: Callable[..., object] = model.forward
    if not by_keyword(model, batch) or batch.keys() <= inspect.signature(inner).parameters.keys():
        yield
        return

    def forward(**tensors: Tensor) -> object:
        return inner(**tensors)

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in batch]
    vars(forward)["__signature__"] = inspect.Signature(names)
    attributes = vars(model)
    before = {name: attributes[name] for name in ("forward",) if name in attributes}
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)


def _check_names(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if unknown := batch.keys() - parameters.keys():
        raise ExportRejected(
            f"{type(model).__name__}.forward() takes {', '.join(parameters) or 'nothing'}, and the sample has "
            f"{', '.join(sorted(unknown))}: give its tensors the names that forward() has"
        )
