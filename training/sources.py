"""Models and data by name, by `module:function`, or from a file."""

import importlib
import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.tasks import Classification, Task
from tnm_pipeline.training.user_modules import import_user_module


class SourceError(ValueError):
    """A model or data source that cannot be found, or that gives something else than it should."""


class MissingPackageError(SourceError):
    """A source that needs a package which is not installed."""


@dataclass(frozen=True)
class Splits:
    """Inputs and targets of a supervised task.

    Attributes:
        train: the inputs and, last, the targets; for a classification inputs (S, ...) float and targets (S,) int64
            class indices.
        test: likewise; never trained on.
        task: what is learned from them.
    """

    train: TensorDataset
    test: TensorDataset
    task: Task = field(default_factory=Classification)


def digits() -> Splits:
    """1,797 handwritten digits, 8x8 scans that ship with scikit-learn; inputs (S, 1, 8, 8) in [0, 1].

    The last quarter is the test set. The scans come writer by writer (UCI, Alpaydin & Kaynak 1998), so nearly all of it
    is by writers that the training set does not have.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    inputs = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    targets = torch.from_numpy(bunch.target).long()
    cut = len(inputs) * 3 // 4
    return Splits(TensorDataset(inputs[:cut], targets[:cut]), TensorDataset(inputs[cut:], targets[cut:]))


def digits_mlp(hidden: int = 20) -> nn.Module:
    """64 -> hidden -> hidden -> 10, narrow enough that sparsity costs something."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def digits_cnn(channels: int = 16) -> nn.Module:
    """Three 3x3 convolutions with batch norm, two of them strided, and a classifier; (B, 1, 8, 8) -> (B, 10)."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, channels, 1),
        *block(channels, channels, 2),
        *block(channels, 2 * channels, 2),
        nn.Flatten(),
        nn.Linear(8 * channels, 2 * channels),
        nn.ReLU(),
        nn.Linear(2 * channels, 10),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"digits-mlp": digits_mlp, "digits-cnn": digits_cnn}
DATA: dict[str, Callable[..., Splits]] = {"digits": digits}
HUB = "hf:"  # before a folder or a name on the Hugging Face hub
_FORMS = {  # what a source can be beside a built-in name and module:function
    "model": "hf:FOLDER_OR_NAME",
    "data": "an .npz, .tsv or .csv file, a folder with train/ and test/",
    "calibration": "an .npz or .txt file, a folder of images, hf:FOLDER_OR_NAME",
}


def load_model(source: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build an untrained model, or take a pretrained one of Hugging Face.

    Args:
        source: a built-in name (`digits-mlp`, `digits-cnn`), `module:function`, importable from the current folder, or
            `hf:` and a local folder or a name in the hub's cache, see `tnm_pipeline.training.huggingface.pretrained`.
        arguments: keyword arguments of the function; of a Hugging Face model, `class`.

    Raises:
        SourceError: not found, it raised, or what came back is not an `nn.Module`.
        MissingPackageError: transformers is not installed.
    """
    if source.startswith(HUB):
        from tnm_pipeline.training.huggingface import pretrained  # which imports this module

        return pretrained(source.removeprefix(HUB), arguments)
    model = call_source(source, arguments, MODELS, "model")
    if not isinstance(model, nn.Module):
        raise SourceError(f"model source {source!r} returned a {type(model).__name__}: return an nn.Module")
    return model


def load_data(source: str, arguments: Mapping[str, Any]) -> Splits:
    """Load training and test data.

    Args:
        source: a built-in name (`digits`); a `.npz` file with x_train, y_train, x_test, y_test; a `.tsv` or `.csv` file
            of sentence pairs, see `tnm_pipeline.training.pairs`; a folder of images in class folders, see
            `tnm_pipeline.training.image_folder`; or `module:function` that returns `Splits` or those four arrays in
            that order.
        arguments: keyword arguments of the function, or of the file or folder.

    Raises:
        SourceError: not found, it raised, malformed, NaN inputs, targets that are not class indices, or one class.
        MissingPackageError: the source needs a package that is not installed.
    """
    if source.endswith((".tsv", ".csv")):
        pairs = importlib.import_module("tnm_pipeline.training.pairs")  # which imports this module
        load_pairs = partial(pairs.load_pairs, source)
        check_arguments(load_pairs, source, arguments, "data")
        splits: Splits = load_pairs(**arguments)
        return splits
    if source and source not in DATA and Path(source).is_dir():
        folders = importlib.import_module("tnm_pipeline.training.image_folder")  # likewise
        images: Splits = folders.load_image_folder(Path(source), arguments)
        return images
    if source.endswith(".npz"):
        if arguments:
            raise SourceError(f"data file {source} takes no arguments, got {dict(arguments)}")
        return _from_npz(Path(source))
    result = call_source(source, arguments, DATA, "data")
    if isinstance(result, Splits):
        plain = type(result.train) is type(result.test) is TensorDataset
        if not plain or not isinstance(result.task, Classification):
            return result
        result = (*result.train.tensors, *result.test.tensors)
    if isinstance(result, tuple | list) and len(result) == 4:
        return _splits(source, *result)
    raise SourceError(
        f"data source {source!r} returned a {type(result).__name__}: return Splits, or the tuple "
        "(x_train, y_train, x_test, y_test)"
    )


def call_source(
    source: str, arguments: Mapping[str, Any], built_in: Mapping[str, Callable[..., Any]], kind: str
) -> Any:
    """What a built-in function or the user's `module:function` returns.

    Args:
        source: the name.
        arguments: keyword arguments of the function.
        built_in: functions by name.
        kind: `model`, `data` or `calibration`, for the messages.

    Raises:
        SourceError: there is no such function, it does not take the arguments, or it raised.
    """
    function = built_in.get(source) or _function(source, kind, built_in)
    check_arguments(function, source, arguments, kind)
    with user_errors(source, kind):
        return function(**arguments)


def require(package: str, extra: str, source: str) -> Any:
    """Import a package that only some sources need.

    Args:
        package: its import name.
        extra: the extra of this distribution that brings it.
        source: what needs it, for the message.

    Raises:
        MissingPackageError: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{source} needs {package} ({error}): run `pip install 'tnm-pipeline[{extra}]'`"
        ) from error


def check_arguments(function: Callable[..., Any], source: str, arguments: Mapping[str, Any], kind: str) -> None:
    """Refuse arguments that a function does not take.

    Raises:
        SourceError: one is missing or unknown; the message names it.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise SourceError(f"{kind} source {source!r} does not take {dict(arguments)}: {error}") from error


@contextmanager
def user_errors(source: str, kind: str) -> Iterator[None]:
    """What the user's own code raises inside, as a `SourceError`; running out of memory stays what it is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, SourceError):
        raise
    except Exception as error:  # the user's own code may raise anything
        raise SourceError(f"{kind} source {source!r} raised {type(error).__name__}: {error}") from error


def _function(source: str, kind: str, built_in: Mapping[str, Any]) -> Callable[..., Any]:
    module_name, separator, function_name = source.partition(":")
    if not separator or not all(part.isidentifier() for part in module_name.split(".")):
        names = ", ".join([*built_in, _FORMS[kind]])
        raise SourceError(f"unknown {kind} source {source!r}: use {names} or module:function")
    try:
        function = getattr(import_user_module(module_name), function_name)
    except Exception as error:  # importing runs the user's own code, which may raise anything
        raise SourceError(f"cannot import {kind} source {source!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise SourceError(f"{kind} source {source!r} is a {type(function).__name__}, not a function")
    checked: Callable[..., Any] = function
    return checked


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SourceError(f"data file {path} does not exist")
    return path


def _zip(file: BinaryIO) -> BinaryIO:
    """The file, if it is an archive: of anything else numpy says that it may be loaded unsafely."""
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("it is cut off, or not an archive of arrays; write it with numpy.savez")
    file.seek(0)
    return file


@contextmanager
def npz_arrays(path: Path) -> Iterator[Any]:
    """The arrays of an `.npz` file by name, read when asked for.

    Raises:
        SourceError: the file does not exist, or it or an array in it cannot be read.
    """
    try:
        # Opened here, because numpy leaves a file open that it cannot read.
        with _existing(path).open("rb") as file, np.load(_zip(file)) as arrays:
            yield arrays
    except SourceError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is not a readable npz file: {error}") from error


def _from_npz(path: Path) -> Splits:
    with npz_arrays(path) as arrays:
        names = ("x_train", "y_train", "x_test", "y_test")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise SourceError(f"{path} lacks {', '.join(missing)}; it has {', '.join(arrays.files)}")
        return _splits(str(path), *(arrays[name] for name in names))


def _splits(source: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Splits:
    splits = Splits(_dataset(source, "train", x_train, y_train), _dataset(source, "test", x_test, y_test))
    targets = splits.train.tensors[1]
    if bool((targets == targets[0]).all()):
        raise SourceError(
            f"{source}: every train target is {int(targets[0])}: with one class there is nothing to learn"
        )
    return splits


def _dataset(source: str, split: str, x: Any, y: Any) -> TensorDataset:
    try:
        inputs, targets = torch.as_tensor(x), torch.as_tensor(y)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{source}: {split} holds something else than numbers: {error}") from error
    if targets.is_floating_point() or targets.is_complex() or targets.dim() != 1:
        raise SourceError(f"{source}: {split} targets must be class indices of shape (S,), got {_describe(targets)}")
    if inputs.dim() == 0 or len(inputs) == 0 or len(inputs) != len(targets):
        raise SourceError(
            f"{source}: {split} has inputs {tuple(inputs.shape)} and {len(targets)} targets: want (S, ...) and S, S > 0"
        )
    targets = targets.long()
    if int(targets.min()) < 0:
        raise SourceError(f"{source}: {split} has the target {int(targets.min())}: class indices start at 0")
    inputs = inputs.float()
    if not bool(torch.isfinite(inputs).all()):
        raise SourceError(f"{source}: {split} inputs contain NaN or Inf; clean them first")
    return TensorDataset(inputs, targets)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
