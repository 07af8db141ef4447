"""How the mask kernels are compiled: once per machine, without the GIL, with a line on stderr when it takes a while."""

import logging
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba

_log = logging.getLogger(__name__)
_SILENT_SECONDS = 1.0


def _fingerprint() -> str:
    """Hash of the sources in this folder and those below, without those of the GPU's kernels."""
    sources = sorted(path for path in Path(__file__).parent.rglob("*.py") if not path.name.startswith("cuda"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


# numba's cache notices changes in the kernel's own file only. Default arguments are part of its keys: a kernel with
# this one is compiled again when any file here changes.
FINGERPRINT = _fingerprint()


def inlined(function: Callable[..., Any]) -> Any:
    """Paste a function into the kernels that call it, where its arguments may be constants."""
    return numba.njit(inline="always", error_model="numpy")(function)


def compiled(function: Callable[..., Any], *, any_order: bool = False) -> Any:
    """Compile a kernel on its first call, and keep the machine code on disk.

    It is kept in NUMBA_CACHE_DIR if that is set, else in `__pycache__`, else in the user's cache folder; where nothing
    can be written, every process compiles anew.

    Args:
        function: the kernel.
        any_order: let floats be added in any order, in which a loop can use vectors.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"} if any_order else False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba's answer to a machine without a folder to write to
        _log.warning("mask kernels are compiled in every process: %s; set NUMBA_CACHE_DIR to a writable folder", error)
        return numba.njit(**options)(function)


def call(kernel: Any, what: str, *arguments: Any) -> Any:
    """Call a kernel; say so on stderr if it has to be compiled first.

    Args:
        kernel: what `compiled` returned.
        what: the kernel's name for a person.
        *arguments: its arguments.
    """
    if kernel.signatures:
        return kernel(*arguments)
    message = "compiling the %s mask kernel, once per machine"
    notice = threading.Timer(_SILENT_SECONDS, _log.warning, (message, what))
    notice.daemon = True
    notice.start()
    try:
        return kernel(*arguments)
    finally:
        notice.cancel()
