"""What a GPU did while something was timed on it: whether it slowed itself down, and whether it worked for others too.

Asked from NVML, the library of the NVIDIA driver, through ctypes: a call takes microseconds where `nvidia-smi` takes a
tenth of a second, after which the GPU is idle again and shows nothing. No call was made on a real driver yet; the tests
answer in its place as nvml.h documents.
"""

import ctypes
import sys
import time
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.export.reasons import Finding, finding

_SUCCESS, _INSUFFICIENT_SIZE = 0, 7  # nvmlReturn_t
_SM_CLOCK, _GPU_TEMPERATURE = 1, 0  # nvmlClockType_t, nvmlTemperatureSensors_t
# nvmlClocksThrottleReasons. Those left out are no slowdown: idle, clocks that somebody set, and company (sync boost).
_SLOWDOWNS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}
_POLICIES = {0: "power limit", 1: "thermal limit", 3: "board limit"}  # nvmlPerfPolicyType_t
_TOLERATED = 0.01  # share of the time


class _ViolationTime(ctypes.Structure):
    """nvmlViolationTime_t: when it was asked in microseconds, and for how long the clocks were held down."""

    _fields_ = (("asked_us", c_ulonglong), ("violated_ns", c_ulonglong))


@dataclass(frozen=True)
class GpuState:
    """GPU 0 at one moment. What its driver does not tell is None, or missing.

    Attributes:
        at_ns: When, on a clock that only counts up.
        slowed_by: What holds its clocks down right now.
        slowed_ns: Cause -> for how long it has done so, since the driver was loaded.
        clock_mhz: Of its multiprocessors.
        max_clock_mhz: The highest that they take.
        temperature_c: In degrees Celsius.
        processes: That compute on it, this one included.
        mig: Whether it is cut into instances, of which this process may see one.
    """

    at_ns: int
    slowed_by: tuple[str, ...]
    slowed_ns: Mapping[str, int]
    clock_mhz: int | None
    max_clock_mhz: int | None
    temperature_c: int | None
    processes: int | None
    mig: bool | None


def read() -> GpuState | None:
    """Look at the GPU that CUDA calls 0; None where there is no driver or none that answers. Never raises."""
    library, bus_id = _nvml(), _bus_id()
    return None if library is None or bus_id is None else read_from(library, bus_id)


def read_from(library: Any, bus_id: bytes) -> GpuState | None:
    """The same from a given library.

    Args:
        library: NVML, loaded and initialised.
        bus_id: Of the GPU on the PCI bus: NVML counts GPUs in another order than CUDA.
    """
    device = c_void_p()
    if _ask(library, "nvmlDeviceGetHandleByPciBusId_v2", c_char_p(bus_id), byref(device)) != _SUCCESS:
        return None
    reasons = _number(library, c_ulonglong(), "nvmlDeviceGetCurrentClocksThrottleReasons", device)
    return GpuState(
        at_ns=time.monotonic_ns(),
        slowed_by=tuple(name for bit, name in _SLOWDOWNS.items() if (reasons or 0) & bit),
        slowed_ns=dict(_slowed(library, device)),
        clock_mhz=_number(library, c_uint(), "nvmlDeviceGetClockInfo", device, c_int(_SM_CLOCK)),
        max_clock_mhz=_number(library, c_uint(), "nvmlDeviceGetMaxClockInfo", device, c_int(_SM_CLOCK)),
        temperature_c=_number(library, c_uint(), "nvmlDeviceGetTemperature", device, c_int(_GPU_TEMPERATURE)),
        processes=_processes(library, device),
        mig=_mig(library, device),
    )


def disturbance(before: GpuState | None, after: GpuState | None) -> Finding | None:
    """Why times that were taken between two looks at a GPU say little; None if nothing was seen.

    A GPU at its power limit counts as disturbed: a sparse product draws less power, and alone it would run at higher
    clocks than those that it shares with the dense one in turns.
    """
    if before is None or after is None:
        return None
    processes = max(before.processes or 0, after.processes or 0)
    if processes > 1:
        return finding("gpu-shared", why=f"{processes} processes computed on it")
    causes = list(dict.fromkeys((*before.slowed_by, *after.slowed_by)))
    elapsed = max(1, after.at_ns - before.at_ns)
    for cause, total in after.slowed_ns.items():
        share = (total - before.slowed_ns.get(cause, total)) / elapsed
        if share > _TOLERATED:
            causes.append(f"{cause} in {share:.0%} of the time")
    if not causes:
        return None
    clocks = f"{after.clock_mhz or '?'} of {after.max_clock_mhz or '?'} MHz"
    return finding("gpu-throttled", why=f"{', '.join(causes)}; {clocks}, {after.temperature_c or '?'} C at the end")


@cache
def _nvml() -> Any:
    """The library, initialised once; None where it is missing or does not start."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    return library if _ask(library, "nvmlInit_v2") == _SUCCESS else None


@cache
def _bus_id() -> bytes | None:
    """Where CUDA's GPU 0 is on the PCI bus."""
    device, text = c_int(), ctypes.create_string_buffer(32)
    try:
        driver = CudaDriver()
        driver.call("cuDeviceGet", byref(device), 0)
        driver.call("cuDeviceGetPCIBusId", text, len(text), device)
    except (OSError, AttributeError, EnvironmentLacks):  # no driver, one that is too old, one that does not answer
        return None
    return text.value


def _ask(library: Any, name: str, *arguments: object) -> int | None:
    """What a function returns; None where this driver has none of that name."""
    function = getattr(library, name, None)
    return None if function is None else int(function(*arguments))


def _number(library: Any, value: Any, name: str, *arguments: object) -> int | None:
    return int(value.value) if _ask(library, name, *arguments, byref(value)) == _SUCCESS else None


def _slowed(library: Any, device: c_void_p) -> Iterator[tuple[str, int]]:
    for policy, name in _POLICIES.items():
        spent = _ViolationTime()
        if _ask(library, "nvmlDeviceGetViolationStatus", device, c_int(policy), byref(spent)) == _SUCCESS:
            yield name, int(spent.violated_ns)


def _processes(library: Any, device: c_void_p) -> int | None:
    """Their number alone: asked without room for a list, NVML says how long the list would be."""
    count = c_uint(0)
    code = _ask(library, "nvmlDeviceGetComputeRunningProcesses_v3", device, byref(count), None)
    return count.value if code in (_SUCCESS, _INSUFFICIENT_SIZE) else None


def _mig(library: Any, device: c_void_p) -> bool | None:
    current, pending = c_uint(), c_uint()
    code = _ask(library, "nvmlDeviceGetMigMode", device, byref(current), byref(pending))
    return bool(current.value) if code == _SUCCESS else None
