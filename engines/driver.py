"""Which NVIDIA driver and GPUs this machine has, asked through ctypes before any runtime is imported.

TensorRT's runtime object segfaults on a machine without a driver, so the question cannot be left to it.
"""

import ctypes
from ctypes import byref, c_int
from dataclasses import dataclass

from tnm_pipeline.engines.cuda import CudaDriver, CudaError

# CUdevice_attribute values of cuda.h
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it (`"NVIDIA H200"`).
        compute_capability: `"9.0"`.
    """

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Driver:
    """What the probe found.

    Attributes:
        cuda_version: The newest CUDA version that the driver supports (`"13.0"`), None without a driver.
        gpus: Visible GPUs in CUDA's order; empty without any.
        reason: Why there is no GPU, None where there is one.
    """

    cuda_version: str | None
    gpus: tuple[Gpu, ...]
    reason: str | None


def probe() -> Driver:
    """Ask the CUDA driver what is here. Never raises: what fails becomes the `reason`."""
    try:
        driver = CudaDriver()
    except OSError as error:
        return Driver(None, (), f"no NVIDIA driver is installed ({error})")
    except AttributeError as error:
        return Driver(None, (), f"the NVIDIA driver is too old ({error})")
    except CudaError as error:
        return Driver(None, (), f"the NVIDIA driver does not start: {error}; try `nvidia-smi`")
    try:
        version, count = c_int(), c_int()
        driver.call("cuDriverGetVersion", byref(version))
        driver.call("cuDeviceGetCount", byref(count))
        gpus = tuple(_gpu(driver, index) for index in range(count.value))
    except CudaError as error:
        return Driver(None, (), f"the NVIDIA driver does not answer: {error}")
    # cuda.h: 1000 * major + 10 * minor
    found = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Driver(found, gpus, None if gpus else "the NVIDIA driver shows no GPU; check CUDA_VISIBLE_DEVICES")


def _gpu(driver: CudaDriver, index: int) -> Gpu:
    device, major, minor = c_int(), c_int(), c_int()
    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGet", byref(device), index)
    driver.call("cuDeviceGetName", name, len(name), device)
    driver.call("cuDeviceGetAttribute", byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.call("cuDeviceGetAttribute", byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
