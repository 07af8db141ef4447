"""What TensorRT and TensorRT-RTX ask of a machine, and what they say: checks, import, and the logger.

The caller has probed the driver: a `Runtime` made on a machine without one crashes the process.
"""

import importlib
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tnm_pipeline.engines.driver import Driver
from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.manifest import Manifest

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # module -> what pip installs
_UNCLAIMED_KEPT = 4
_AMPERE = (8, 0)  # compute capability


def check_gpu(manifest: Manifest, driver: Driver) -> None:
    """Refuse a machine whose first GPU is not one the plan runs on; imports nothing.

    Args:
        manifest: The manifest of the plan.
        driver: What the driver probe found.

    Raises:
        EnvironmentLacks: There is no GPU, or its compute capability is not in the manifest, which may also say that
            the plan runs on all since Ampere.
    """
    if not driver.gpus:
        raise EnvironmentLacks(
            f"{manifest.artifact} is a {manifest.backend} plan and needs a GPU: {driver.reason}. Run it on a machine "
            f"with an NVIDIA driver and a GPU of compute capability {', '.join(manifest.compute_capabilities)}"
        )
    gpu, built_for = driver.gpus[0], manifest.compute_capabilities
    since_ampere = manifest.hardware_compatible == "ampere_plus" and _numbers(gpu.compute_capability) >= _AMPERE
    if gpu.compute_capability not in built_for and not since_ampere:
        raise EnvironmentLacks(
            f"{manifest.artifact} was built for compute capability {', '.join(built_for)}, and {gpu.name} "
            f"has {gpu.compute_capability}: build it for this GPU with `tnm-pipeline export --trt --set "
            f"'trt.compute_capabilities=[\"{gpu.compute_capability}\"]'`"
        )


def runtime_module(manifest: Manifest) -> Any:
    """Import what the manifest names: a plan runs only in the release that built it, or later ones if it says so.

    Source: NVIDIA, "Engine Compatibility", for both TensorRT and TensorRT-RTX.

    Raises:
        EnvironmentLacks: It is not installed, a library of it is missing, or it is another release or too old.
    """
    package, built_with = _PACKAGES[manifest.backend], manifest.backend_version
    release = ".".join(built_with.split(".")[:2])
    install = f"pip install '{package}=={release}.*'"
    try:
        trt: Any = importlib.import_module(manifest.backend)
    except (ImportError, OSError) as error:  # OSError: a library of the package cannot be loaded
        raise EnvironmentLacks(
            f"{manifest.artifact} needs {manifest.backend} {built_with}: {error}. Run `{install}`"
        ) from error
    if not hasattr(trt, "ExecutionContextAllocationStrategy"):  # new in TensorRT 10, which shares profiles too
        raise EnvironmentLacks(
            f"{manifest.artifact} was built with {manifest.backend} {built_with}, and {trt.__version__} is installed: "
            "TensorRT 10 is the oldest that is served. Build it again with a newer one: `tnm-pipeline export --trt`"
        )
    here, there = _numbers(trt.__version__), _numbers(built_with)
    if here != there and not (manifest.version_compatible and here > there):
        raise EnvironmentLacks(
            f"{manifest.artifact} was built with {manifest.backend} {built_with}, and {trt.__version__} is "
            f"installed: run `{install}`, or rebuild it with `tnm-pipeline export --trt`"
        )
    return trt


def _numbers(version: str) -> tuple[int, ...]:
    """The first two: those of a release, or a compute capability."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version)[:2])


class Complaints:
    """The errors that TensorRT logs, told apart by the thread that they come from. Any number of threads.

    TensorRT has one logger for the process and logs a call's errors on the thread of the call. What it logs on a
    thread of its own belongs to no call that we know of: it is quoted as such where a call fails in silence.
    """

    def __init__(self) -> None:
        self._calls = threading.local()
        self._unclaimed: deque[str] = deque(maxlen=_UNCLAIMED_KEPT)

    @contextmanager
    def of_this_call(self) -> Iterator[None]:
        """Collect what is logged on this thread from here on, and forget it afterwards."""
        self._calls.heard = []
        try:
            yield
        finally:
            del self._calls.heard

    def hear(self, message: str) -> None:
        """Take one error message; called by the logger."""
        getattr(self._calls, "heard", self._unclaimed).append(message)

    def __str__(self) -> str:
        """What this call is told, for a sentence."""
        heard: list[str] = getattr(self._calls, "heard", [])
        if heard:
            return "; ".join(heard)
        if self._unclaimed:
            return f"it gives no reason; it said on a thread of its own: {'; '.join(self._unclaimed)}"
        return "it gives no reason"


@cache
def logger_of(module: str) -> tuple[Any, Complaints]:
    """The one logger of `tensorrt` or `tensorrt_rtx`, and what it collects: errors, for exceptions; no more.

    The first logger that a process hands to TensorRT serves all later runtimes too, through a bare pointer. So there
    is one, and it is never freed.
    """
    trt: Any = importlib.import_module(module)
    complaints = Complaints()

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base is known only once the module is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding refuses super()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                complaints.hear(message)

    return Collector(), complaints
