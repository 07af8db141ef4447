"""The run folder: one lock, one record per finished stage, so that only what changed is done again."""

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tnm_pipeline.pipeline.errors import ConfigError, RunLocked
from tnm_pipeline.training.atomic import write_atomically

STATE_FILE = "state.safetensors"  # of an interrupted training, kept between runs of the same key


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock dies with the process.

    Raises:
        RunLocked: another process holds it; names its pid and host.
        ConfigError: the folder cannot be made or written.
    """
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise RunLocked(f"{folder} is in use by {who}: wait for it, or choose another folder with --folder") from None
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        if error.filename is None or not str(error.filename).startswith(str(folder)):
            raise
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder with --folder") from error


@dataclass(frozen=True)
class Record:
    """What is known of a finished stage.

    Attributes:
        key: identifies its settings, inputs and code.
        outputs: path relative to the stage's folder -> sha256.
        seconds: wall time that it took.
    """

    key: str
    outputs: dict[str, str]
    seconds: float


class StageCache:
    """Finished stages of one run folder.

    Args:
        folder: the run folder; stage NAME writes into `folder/NAME`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / ".cache"

    def key(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> str:
        """Hash of everything a stage depends on: its name, settings, the content of its inputs, the code."""
        facts = {
            "stage": name,
            "settings": settings,
            "inputs": {label: sha256_of(path) for label, path in inputs.items()},
            "code": code_fingerprint(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, name: str, key: str) -> Record | None:
        """The record of a stage if it ended with this key and every output is still what it wrote."""
        try:
            record = Record(**json.loads((self._records / f"{name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None
        if record.key != key:
            return None
        for relative, digest in record.outputs.items():
            path = self.folder / name / relative
            if not path.is_file() or sha256_of(path) != digest:
                return None
        return record

    def begin(self, name: str, key: str) -> Path:
        """Clear what another key left in the stage's folder; keep the state of an interrupted run of this key.

        Returns:
            The stage's folder, which exists.
        """
        (self._records / f"{name}.json").unlink(missing_ok=True)
        marker = self._records / f"{name}.started"
        target = self.folder / name
        same_key = marker.exists() and marker.read_text(encoding="utf-8") == key
        for path in target.glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif not (same_key and path.name == STATE_FILE):
                path.unlink()
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, key.encode())
        return target

    def finish(self, name: str, key: str, started: float) -> Record:
        """Record every file in the stage's folder as its output."""
        target = self.folder / name
        files = sorted(path for path in target.rglob("*") if path.is_file())
        outputs = {path.relative_to(target).as_posix(): sha256_of(path) for path in files}
        record = Record(key, outputs, time.monotonic() - started)
        write_atomically(self._records / f"{name}.json", json.dumps(vars(record), indent=2, sort_keys=True).encode())
        (self._records / f"{name}.started").unlink()
        return record


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_fingerprint() -> str:
    """Hash of this package's sources: a result made by other code is made again."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    from tnm_pipeline import engines, export, training

    folders = [root, *(Path(package.__path__[0]) for package in (training, export, engines))]
    for folder in folders:
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.j2")]):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def source_fingerprint(source: str) -> str:
    """What identifies the content behind a model or data source, without importing it.

    Args:
        source: a built-in name, an `.npz` file, or `module:function`.

    Returns:
        The hash of the file behind it; the name itself when it is built in (the code fingerprint covers those) or
        cannot be found (the stage that loads it says what is wrong).
    """
    path = Path(source)
    module, separator, _ = source.partition(":")
    if separator:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module)
            path = Path(spec.origin) if spec and spec.origin else path
    return sha256_of(path) if path.is_file() else source
