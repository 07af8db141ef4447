"""What a conversion has finished, on disk: a killed one goes on after its last whole layer.

One file for each stop, written whole or not at all. A file holds the tensors that the stop changed, bit for bit, so the
activations that follow, and with them all later layers, are those of the conversion that was never killed. One more
holds what was found before the first stop: another machine might find something else, which finished layers do not fit.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.checkpoint import unshared
from tnm_pipeline.training.convert.batch import Batch, tensors_of

Entry = tuple[dict[str, Tensor], dict[str, Any]]

_IDENTITY = "conversion.json"
_START = "start.safetensors"


class JournalError(ValueError):
    """A folder that holds the progress of another conversion, a damaged one, or one that not all processes see."""


class Journal:
    """The finished stops of one conversion in a folder."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Open or begin.

        Args:
            folder: made if needed.
            identity: of the conversion, from `identify`.

        Raises:
            JournalError: the folder belongs to another conversion, or is damaged.
        """
        self._folder = folder
        path = folder / _IDENTITY
        if path.is_file():
            if _read_identity(path) != identity:
                raise JournalError(
                    f"{folder} holds the progress of another conversion: another model, data, pattern or setting. "
                    "Remove it to start anew, or choose another folder"
                )
        else:
            write_atomically(path, json.dumps({"identity": identity}).encode())

    def has(self, stop: str) -> bool:
        """Whether a stop is finished."""
        return self._path(stop).is_file()

    def read(self, stop: str) -> Entry | None:
        """The tensors and the record of a finished stop; `None`: it is not finished.

        Raises:
            JournalError: the file is damaged.
        """
        return _read(self._path(stop), "remove it, and the layer is converted again") if self.has(stop) else None

    def write(self, stop: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Note that a stop is finished."""
        _write(self._path(stop), tensors, record)

    def read_start(self) -> Entry | None:
        """What `write_start` noted; `None`: nothing, nor is a stop finished.

        Raises:
            JournalError: the file is damaged, or missing beside finished stops.
        """
        path = self._folder / _START
        if path.is_file():
            return _read(path, "remove its folder to start anew")
        if any(self._folder.glob("*.safetensors")):
            raise JournalError(
                f"{self._folder} holds finished layers, but not {_START}, the order of channels and the bases of heads "
                "that they are in: remove it to start anew, or choose another folder"
            )
        return None

    def write_start(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Note what all stops depend on, before the first."""
        _write(self._folder / _START, tensors, record)

    def _path(self, stop: str) -> Path:
        digest = hashlib.sha256(stop.encode()).hexdigest()[:8]  # names of modules may differ in case only
        return self._folder / f"{stop or 'model'}-{digest}.safetensors"


def remove_journal(folder: Path) -> None:
    """Remove the journal of a finished conversion; a kill meanwhile leaves all of it, or nothing by this name."""
    leaving = folder.with_name(f"{folder.name}.leaving")
    if leaving.exists():
        shutil.rmtree(leaving)
    folder.replace(leaving)
    shutil.rmtree(leaving)


def _read(path: Path, remedy: str) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            record = json.loads(file.metadata()["record"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise JournalError(f"{path} is damaged ({error}): {remedy}") from error
    return tensors, record


def _write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, serialize(unshared(held), metadata={"record": json.dumps(dict(record))}))


def _read_identity(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"{path} is damaged ({error}): remove its folder to start anew, or choose another folder"
        ) from error


def identify(models: Iterable[nn.Module], batches: Iterable[Batch], settings: Mapping[str, object]) -> str:
    """A digest of everything that a conversion depends on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    named = [item for model in models for item in model.state_dict().items()]
    named += [item for batch in batches for item in tensors_of(batch)]
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
