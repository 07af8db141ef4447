"""Unlabelled model inputs for calibration: from arrays, text, images, Hugging Face data sets or the user's function."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, check_batches, tensors_of
from tnm_pipeline.training.drawing import Draw, as_input, as_tensor, check_lengths
from tnm_pipeline.training.huggingface import Tokenization, open_dataset
from tnm_pipeline.training.images import ImagePreparation, image_files, read_images
from tnm_pipeline.training.sources import (
    DATA,
    HUB,
    SourceError,
    Splits,
    call_source,
    check_arguments,
    load_data,
    npz_arrays,
    user_errors,
)
from tnm_pipeline.training.tasks import Similarity

Settings = TypeVar("Settings")
_KIND = "calibration"
_LABELS = {"y_train", "x_test", "y_test", "labels"}  # arrays of a file for training that are no inputs


def load_calibration(
    source: str, arguments: Mapping[str, Any], *, samples: int, batch_size: int, seed: int
) -> list[Batch]:
    """Load unlabelled inputs; labels are dropped.

    Sources and their arguments:
        `FILE.npz`: `x_train`, or an `x` that is alone but for labels, one float32 tensor for the model; else every
            array by name (float32, int64 or bool), as keyword arguments of the model's forward, such as `input_ids`
            and `attention_mask`. Labels are `labels`, and a `y` of one whole number, or text, for each example.
        `FILE.txt`: UTF-8, a sentence a line, empty lines left out; `tokenizer`, `max_length`: see `Tokenization`.
        `FILE.tsv`, `FILE.csv`: the sentences of the training pairs; arguments as for training.
        a folder: its images; `size`, `resize`, `mean`, `std`: see `ImagePreparation`. Of a folder with `train/` and
            `test/` only the former; `flip` and `pad`, for training, are left out.
        `hf:FOLDER_OR_NAME`: `split`, `subset`, `column`, and what its content needs: text as for a text file, images
            as for a folder; a list of columns goes to the model by name.
        a built-in name or `module:function`: `Splits` or (x_train, y_train, x_test, y_test), one tensor, tensors by
            name, or batches, which are taken in their order and as they are cut until there are enough examples.

    Args:
        source: one of these.
        arguments: of the source.
        samples: how many examples, chosen at random by the seed; all where there are fewer.
        batch_size: most examples in a batch. Only sentences of one length share a batch, so that no padding exists;
            batches of anything else have one size, at least half of this, and what does not fill them is left out.
        seed: the same one gives the same batches.

    Returns:
        Batches on the CPU; `count_examples` says how many examples they hold.

    Raises:
        SourceError: not found, unreadable, malformed, arguments that do not fit, NaN, or fewer than 2 examples.
        MissingPackageError: the source needs a package that is not installed.
    """
    batches = _reader(source)(source, arguments, Draw(samples, batch_size, seed))
    count = count_examples(batches)
    if count < 2:
        raise SourceError(
            f"calibration source {source!r} gives {count} examples: at least 2 are needed, 128 or more are usual"
        )
    try:
        check_batches(batches)
    except CalibrationError as error:
        raise SourceError(f"calibration source {source!r}: {error}") from error
    return batches


def count_examples(batches: Iterable[Batch]) -> int:
    """How many examples the batches hold together: the lengths of their first axes."""
    return sum(len(next(tensors_of(batch))[1]) for batch in batches)


_Reader = Callable[[str, Mapping[str, Any], Draw], list[Batch]]


def _reader(source: str) -> _Reader:
    if source in DATA:
        return _from_function
    if source.endswith(".npz"):
        return _from_npz
    if source.endswith(".txt"):
        return _from_text
    if source.endswith((".tsv", ".csv")):
        return _from_pairs
    if source.startswith(HUB):
        return _from_dataset
    return _from_folder if source and Path(source).is_dir() else _from_function


def _from_npz(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    if arguments:
        raise SourceError(f"calibration file {source} takes no arguments, got {dict(arguments)}")
    with npz_arrays(Path(source)) as arrays:
        names = [name for name in arrays.files if name not in _LABELS]
        if "x_train" in names:
            names = ["x_train"]
        if "y" in names and _are_labels(arrays["y"], [arrays[name] for name in names if name != "y"]):
            names.remove("y")
        if not names:
            raise SourceError(f"{source} holds no inputs, only {', '.join(arrays.files) or 'nothing'}: name an array x")
        tensors = {name: as_tensor(f"{source}: {name}", arrays[name]) for name in names}
    if names in (["x"], ["x_train"]):
        return draw.cut(source, tensors[names[0]], Tensor.float)
    return draw.cut(source, tensors)


def _are_labels(y: NDArray[Any], others: list[NDArray[Any]]) -> bool:
    """Whether an array called `y` holds one class for each example, rather than another input."""
    return y.dtype.kind in "iuSU" and y.ndim == 1 and all(other.shape[:1] == y.shape for other in others)


def _from_text(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    tokenization = _tokenization(source, arguments)
    try:
        with Path(source).open(encoding="utf-8-sig") as file:
            sentences = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{source} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise SourceError(f"calibration file {source} cannot be read: {error.strerror}") from error
    return _sentences([sentences[index] for index in draw.choose(len(sentences))], tokenization, draw)


def _from_pairs(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    return _of_pairs(source, load_data(source, arguments), draw)


def _of_pairs(source: str, data: Splits, draw: Draw) -> list[Batch]:
    assert isinstance(data.task, Similarity)
    tensors = dict(zip(data.task.names, (tensor.flatten(0, 1) for tensor in data.train.tensors[:-1]), strict=True))
    tokens = tensors["attention_mask"].sum(1).tolist()
    chosen = draw.choose(len(tokens))
    rows = [{name: tensor[row, : tokens[row]].tolist() for name, tensor in tensors.items()} for row in chosen]
    return draw.by_length(source, rows)


def _from_folder(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    folder = Path(source)
    if all((folder / part).is_dir() for part in ("train", "test")):
        folder /= "train"
        arguments = {name: value for name, value in arguments.items() if name not in ("flip", "pad")}
    preparation = _settings(ImagePreparation, source, arguments)
    files = image_files(folder)
    return [read_images([files[index] for index in batch], preparation) for batch in draw.batches(len(files))]


def _from_dataset(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    content = {name: value for name, value in arguments.items() if name not in ("split", "subset", "column")}
    table = open_dataset(source.removeprefix(HUB), arguments.get("split"), arguments.get("subset"))
    names = _columns(source, table.column_names, arguments.get("column"))
    by_name = isinstance(arguments.get("column"), list)
    kind = "" if by_name else getattr(table.features[names[0]], "dtype", "")
    if kind in ("string", "large_string"):
        tokenization = _tokenization(source, content)
        texts = _values(source, table, draw.choose(len(table)), names[0])
        return _sentences([text for text in texts if text and text.strip()], tokenization, draw)
    if kind == "PIL.Image.Image":
        preparation = _settings(ImagePreparation, source, content)
        drawn = (_values(source, table, rows, names[0]) for rows in draw.batches(len(table)))
        return [torch.stack([preparation.apply(picture) for picture in pictures]) for pictures in drawn]
    if content:
        raise SourceError(f"{source}: {', '.join(names)}: no text and no images, which take {', '.join(content)}")
    if by_name:
        columns = [_values(source, table, draw.choose(len(table)), name) for name in names]
        return draw.by_length(source, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])
    drawn = (_values(source, table, rows, names[0]) for rows in draw.batches(len(table)))
    return [as_input(as_tensor(f"{source}: {names[0]}", values)) for values in drawn]


def _columns(source: str, known: list[str], column: Any) -> list[str]:
    """The columns that were asked for; the only one if none was."""
    asked = column if isinstance(column, list) else [column]
    if column is None and len(known) == 1:
        asked = known
    if not asked or not all(name in known for name in asked):
        raise SourceError(f"{source} has no column {column!r}; set column to one, or a list, of {', '.join(known)}")
    return asked


def _values(source: str, table: Any, rows: list[int], column: str) -> list[Any]:
    try:
        return list(table.select(rows)[column])
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken content raise much else than OSError
        raise SourceError(f"{source}: column {column!r} cannot be read: {type(error).__name__}: {error}") from error


def _from_function(source: str, arguments: Mapping[str, Any], draw: Draw) -> list[Batch]:
    result = call_source(source, arguments, DATA, _KIND)
    if isinstance(result, Splits):
        if isinstance(result.task, Similarity):
            return _of_pairs(source, result, draw)
        result = result.train[:][0]
    elif isinstance(result, tuple) and len(result) == 4:
        return draw.cut(source, as_tensor(f"{source}: x_train", result[0]), Tensor.float)  # as for training
    if isinstance(result, Tensor | np.ndarray):
        return draw.cut(source, as_tensor(source, result))
    if isinstance(result, Mapping):
        return draw.cut(source, {name: as_tensor(f"{source}: {name}", value) for name, value in result.items()})
    if isinstance(result, Dataset) and not isinstance(result, IterableDataset):
        raise SourceError(f"{source} returned a {type(result).__name__} of single examples: wrap it in a DataLoader")
    if isinstance(result, Iterable) and not isinstance(result, str):
        with user_errors(source, _KIND):
            return list(_first(source, result, draw.samples))
    raise SourceError(
        f"calibration source {source!r} returned a {type(result).__name__}: return a tensor, tensors by name or batches"
    )


def _first(source: str, batches: Iterable[Any], samples: int) -> Iterator[Batch]:
    """Batches until there are enough examples; the last one is cut."""
    left = samples
    for index, batch in enumerate(batches):
        if not isinstance(batch, Tensor | Mapping | list | tuple):
            raise SourceError(f"{source}: batch {index} is a {type(batch).__name__}: give a tensor, or several")
        count = check_lengths(f"{source}: batch {index}", batch)
        if isinstance(batch, Tensor):
            yield batch[:left]
        elif isinstance(batch, Mapping):
            yield {name: tensor[:left] for name, tensor in batch.items()}
        else:
            yield [tensor[:left] for tensor in batch]
        left -= count
        if left <= 0:
            return


def _sentences(sentences: list[str], tokenization: Tokenization, draw: Draw) -> list[Batch]:
    rows = tokenization.apply(sentences) if sentences else []
    return draw.by_length(tokenization.tokenizer, [row for row in rows if all(row.values())])


def _tokenization(source: str, arguments: Mapping[str, Any]) -> Tokenization:
    if "tokenizer" not in arguments:
        raise SourceError(
            f"text {source} needs the argument tokenizer: a folder or a name in the hub's cache, usually the model's"
        )
    return _settings(Tokenization, source, arguments)


def _settings(kind: type[Settings], source: str, arguments: Mapping[str, Any]) -> Settings:
    check_arguments(kind, source, arguments, _KIND)
    return kind(**arguments)
