"""The machine and library versions that a measurement belongs to."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from tnm_pipeline.engines.driver import probe

_PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "networkx",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "tnm-pipeline",
)


def environment() -> dict[str, object]:
    """Everything a reader needs to judge or repeat a timing, as JSON-able data."""
    driver = probe()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "gpus": [gpu.name for gpu in driver.gpus],
        "cuda_driver": driver.cuda_version,
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(*_PACKAGES),
    }


def _cpu_model() -> str:
    """The marketing name; `platform.processor()` is empty or only the architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def package_versions(*packages: str) -> dict[str, str]:
    """Distribution -> installed version, of those that are installed."""
    return {name: version for name in packages if (version := package_version(name)) is not None}


def package_version(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
