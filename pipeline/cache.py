"""The run folder: one lock, one record per finished stage, so that only what changed is done again."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from tnm_pipeline.engines.artifact import sha256_of
from tnm_pipeline.pipeline.errors import FULL, ConfigError, RunLocked
from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.user_modules import files_behind

STATE_FILE = "state.safetensors"  # of an interrupted training, kept between runs of the same key
JOURNAL = "progress"  # folder of an interrupted conversion, likewise
# as in `training.sources`, which loads torch
HUB = "hf:"
MODELS = ("digits-mlp", "digits-cnn")
DATA = ("digits",)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock dies with the process.

    Raises:
        RunLocked: another process holds it; names its pid and host.
        ConfigError: the folder cannot be made or written.
        OSError: the disk is full.
    """
    lock = _acquire(folder)
    try:
        yield
    finally:
        lock.release()


def _acquire(folder: Path) -> BaseFileLock:
    lock = FileLock(folder / ".lock", timeout=0)
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise RunLocked(f"{folder} is in use by {who}: wait for it, or choose another folder with --folder") from None
    except OSError as error:
        lock.release()
        if error.errno in FULL:
            raise
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder with --folder") from error
    return lock


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

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record in a file; None when there is none that is whole: the stage is then done again."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                str(fields["key"]), {str(k): str(v) for k, v in fields["outputs"].items()}, fields["seconds"] + 0.0
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None


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
        record = Record.read(self._records / f"{name}.json")
        if record is None or record.key != key:
            return None
        for relative, digest in record.outputs.items():
            path = self.folder / name / relative
            if not path.is_file() or sha256_of(path) != digest:
                return None
        return record

    def is_finished(self, name: str) -> bool:
        """Whether some run has finished a stage, with this key or another."""
        return Record.read(self._paths(name)[0]) is not None

    def refuse_foreign_files(self, name: str) -> None:
        """Make sure that a stage may write into its folder.

        Raises:
            ConfigError: the folder holds files that no run of ours made.
        """
        record, marker, target = self._paths(name)
        if not record.exists() and not marker.exists() and target.exists() and any(target.iterdir()):
            raise ConfigError(
                f"{target} holds files that tnm-pipeline did not write, and stage {name} would replace them: move them "
                "away, or choose another folder with --folder"
            )

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """The record of the finished stage, the marker of the started one, and the stage's folder."""
        return self._records / f"{name}.json", self._records / f"{name}.started", self.folder / name

    def begin(self, name: str, key: str) -> Path:
        """Clear what an earlier run left in the stage's folder; keep how far an interrupted run of this key came.

        Returns:
            The stage's folder, which exists.
        """
        record, marker, target = self._paths(name)
        same_key = marker.exists() and marker.read_bytes() == key.encode()
        if not same_key:
            write_atomically(marker, b"")  # a kill while clearing must not make the rest look like a user's files
        record.unlink(missing_ok=True)
        for path in target.glob("*"):
            if same_key and path.name in (STATE_FILE, JOURNAL):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
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


@cache
def code_fingerprint() -> str:
    """Hash of this package's sources: a result made by other code is made again."""
    from tnm_pipeline import engines, export, training

    roots = [Path(__file__).parent, *(Path(package.__path__[0]) for package in (training, export, engines))]
    return _digest_of(path for root in roots for path in sorted(root.rglob("*.py")))


def source_fingerprint(source: str, built_in: Collection[str] = ()) -> str:
    """What identifies the content behind a model or data source, without running it.

    Args:
        source: a built-in name, a file, a folder, `hf:` and either a folder or a name, or `module:function`.
        built_in: names that win over files and folders, as they do where the source is loaded.

    Returns:
        The hash of the files behind it, hidden ones left out; the name itself when it is built in (the code fingerprint
        covers those), lies in the hub's cache, or cannot be found (the stage that loads it says what is wrong).
    """
    if source in built_in:
        return source
    path = Path(source.removeprefix(HUB))
    if source and path.is_dir():
        found = {one.relative_to(path): one for one in path.rglob("*") if one.is_file()}
        files = [found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.parts)]
        return _digest_of(files, path) if files else source
    if path.is_file():
        return _digest_of([path], path.parent)
    module, separator, _ = source.partition(":")
    files = files_behind(module) if separator and not source.startswith(HUB) else []
    return _digest_of(files) if files else source


def _digest_of(files: Iterable[Path], root: Path | None = None) -> str:
    """Hash of names, below the root if one is given, and contents."""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(root).as_posix() if root else path.name
        digest.update(f"{name}\0{sha256_of(path)}".encode())
    return digest.hexdigest()
