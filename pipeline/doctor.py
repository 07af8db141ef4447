"""What this machine can and cannot do, and the exact command that would change it."""

import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tnm_pipeline.engines.driver import Driver, probe
from tnm_pipeline.export.environment import package_version
from tnm_pipeline.pipeline.tables import new_console


@dataclass(frozen=True)
class Finding:
    """One ability.

    Attributes:
        ability: what a user wants to do.
        works: whether it can be done here.
        detail: what was found.
        remedy: the command or action that would change it; empty when it works.
    """

    ability: str
    works: bool
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def diagnose() -> list[Finding]:
    """Look at the machine; loads no runtime that could crash without a driver."""
    driver = probe()
    return [
        _python(),
        _training(driver),
        _onnxruntime(driver),
        _rtx_builder(),
        _tensorrt_builder(driver),
        _engine_runtime(driver),
        _signatures(),
        _disk(),
    ]


def show(findings: list[Finding]) -> None:
    """Print the findings on stdout; remedies stand on lines of their own, to be copied."""
    console = new_console()
    for finding in findings:
        console.print(f"{'yes' if finding.works else 'no ':3}  {finding.ability}: {finding.detail}")
        if finding.remedy:
            console.print(f"     -> {finding.remedy}")


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("run tnm-pipeline", True, f"Python {version}, tnm-pipeline {metadata.version('tnm-pipeline')}")


def _training(driver: Driver) -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("train on a GPU", True, f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    if driver.gpus:
        remedy = "install a CUDA build of torch: pip install --force-reinstall torch"
    else:
        remedy = "run on a machine with an NVIDIA GPU"
    return Finding("train on a GPU", False, f"torch {torch.__version__} trains on the CPU here", remedy)


def _onnxruntime(driver: Driver) -> Finding:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    detail = f"onnxruntime {onnxruntime.__version__}: {', '.join(providers)}"
    if driver.gpus and "CUDAExecutionProvider" in providers:
        return Finding("run ONNX on a GPU", True, detail)
    remedy = "pip install onnxruntime-gpu" if driver.gpus else "needs an NVIDIA GPU; the CPU provider works"
    return Finding("run ONNX on a GPU", False, detail, remedy)


def _rtx_builder() -> Finding:
    version = package_version("tensorrt-rtx")
    ability = "build TensorRT-RTX plans ahead of time"
    if version:
        return Finding(ability, True, f"tensorrt-rtx {version}, needs no GPU to build")
    return Finding(ability, False, "not installed", "pip install tensorrt-rtx")


def _tensorrt_builder(driver: Driver) -> Finding:
    version = package_version("tensorrt")
    ability = "build TensorRT plans"
    if version and driver.gpus:
        return Finding(ability, True, f"tensorrt {version}")
    detail = f"tensorrt {version}, no GPU" if version else "tensorrt is not installed"
    remedy = "" if version else "pip install 'tnm-pipeline[tensorrt]'"
    if not driver.gpus:
        remedy = f"{remedy} on a machine with an NVIDIA GPU: plans are built on the GPU that runs them".strip()
    return Finding(ability, False, detail, remedy)


def _engine_runtime(driver: Driver) -> Finding:
    ability = "run TensorRT plans, measure sparse against dense"
    if driver.gpus:
        names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in driver.gpus)
        return Finding(ability, True, f"{names}, CUDA {driver.cuda_version}")
    remedy = "install the NVIDIA driver on a machine with a GPU; until then load(..., fallback='onnxruntime') answers"
    return Finding(ability, False, driver.reason or "no GPU", remedy)


def _signatures() -> Finding:
    version = package_version("cryptography")
    ability = "sign artifacts and demand signatures"
    if version:
        return Finding(ability, True, f"cryptography {version}")
    return Finding(ability, False, "cryptography is not installed", "pip install 'tnm-pipeline[sign]'")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / (1 << 30)
    enough = free > 2
    return Finding(
        "write checkpoints and plans here",
        enough,
        f"{free:.1f} GiB free in {Path.cwd()}",
        "" if enough else "free some space, or choose another folder with --folder",
    )
