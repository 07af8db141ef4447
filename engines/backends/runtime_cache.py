"""Kernels that TensorRT-RTX compiled for a plan on this GPU, kept in the user's cache folder between processes.

TensorRT-RTX compiles when it loads and first runs a plan. Its own check refuses a cache of another release, GPU or
driver, and a damaged one. None refuses a forged one, and the content is code: so it is kept where only the user can
write, never beside a plan, and a file that others could have written is left aside.
"""

import os
import sys
import threading
from pathlib import Path

from tnm_pipeline.engines.manifest import Manifest

_OTHERS_MAY_WRITE = 0o022


def runtime_cache_path(manifest: Manifest, version: str, gpu: str) -> Path:
    """Where the cache of a plan lies, for one release and one GPU.

    Args:
        manifest: The manifest of the plan: the name has its hash.
        version: The release of TensorRT-RTX.
        gpu: The GPU's name.
    """
    name = f"{manifest.sha256[:32]}-{version}-{'_'.join(gpu.split())}.rtxcache"
    return _cache_folder() / "tnm-pipeline" / "tensorrt_rtx" / name


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def read_runtime_cache(path: Path) -> bytes | None:
    """The content, None where there is none yet.

    Raises:
        OSError: It cannot be read, or others than this user can write it (PermissionError).
    """
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if sys.platform != "win32" and (facts.st_uid != os.getuid() or facts.st_mode & _OTHERS_MAY_WRITE):
                raise PermissionError(f"{path} can be written by other users: remove it")
            return file.read()
    except FileNotFoundError:
        return None


def write_runtime_cache(path: Path, content: bytes) -> None:
    """Replace the file: a kill leaves the old one or the new one, never half of one.

    Raises:
        OSError: The folder is read-only or full.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
