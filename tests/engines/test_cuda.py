"""Our side of the CUDA driver API, against a driver whose device memory is host memory. The GPU side: pytest -m gpu."""

from collections.abc import Callable

import numpy as np
import pytest

from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device

Run = Callable[..., str]

HELD = "import ctypes; held = ctypes.CDLL('libcuda.so.1').host_driver_held\n"


def test_the_probe_reads_version_name_and_compute_capability(run_on_host_driver: Run) -> None:
    code = "from tnm_pipeline.engines.driver import probe; print(probe())"
    found = "Driver(cuda_version='13.1', gpus=(Gpu(name='Host Memory', compute_capability='8.9'),), reason=None)"
    assert run_on_host_driver(code).strip() == found


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HOST_DRIVER_INIT_FAILS": "100"}, "does not start: cuInit failed with CUDA_ERROR_NO_DEVICE (100)"),
        ({"HOST_DRIVER_INIT_FAILS": "999"}, "does not start: cuInit failed with an unknown error (999)"),
        ({"HOST_DRIVER_NO_GPU": "1"}, "shows no GPU; check CUDA_VISIBLE_DEVICES"),
    ],
)
def test_the_probe_gives_a_reason_instead_of_raising(
    run_on_host_driver: Run, environment: dict[str, str], reason: str
) -> None:
    code = "from tnm_pipeline.engines.driver import probe; d = probe(); print(d.gpus, d.reason)"
    said = run_on_host_driver(code, **environment)
    assert said.startswith("() ")
    assert reason in said


def test_what_goes_up_comes_down_and_everything_is_freed(run_on_host_driver: Run) -> None:
    code = (
        HELD
        + """
import numpy as np
from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device
device = Device(CudaDriver())
for rows in (3, 1000, 0, 7):
    there = np.arange(rows * 5, dtype=np.float32).reshape(rows, 5)
    back = np.empty_like(there)
    with device.current():
        address = device.reserve("x", there.nbytes)
        assert address > 2**32, "a 64-bit address survives the trip through ctypes"
        device.upload(address, there)
        device.download(back, address)
        device.synchronize()
    assert np.array_equal(there, back)
print(held())
device.close()
print(held())
"""
    )
    assert run_on_host_driver(code).split() == ["3", "0"]  # context, stream and one buffer; then nothing


def test_a_buffer_is_reused_until_it_must_grow(run_on_host_driver: Run) -> None:
    code = """
from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device
device = Device(CudaDriver())
with device.current():
    first = device.reserve("x", 100)
    print(device.reserve("x", 100) == device.reserve("x", 1) == device.reserve("x", 0) == first)
    print(device.reserve("y", 100) != first)
    device.reserve("x", 1 << 20)
    print(device.reserve("x", 100) == device.reserve("x", 1 << 20))
"""
    assert run_on_host_driver(code).split() == ["True"] * 3


def test_a_failed_call_is_named_and_the_context_is_restored(run_on_host_driver: Run) -> None:
    code = (
        HELD
        + """
from tnm_pipeline.engines import EnvironmentLacks
from tnm_pipeline.engines.errors import DeviceOutOfMemory
from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device
device = Device(CudaDriver())
for action in (lambda: device.reserve("x", 1 << 40), lambda: device.upload(1, __import__("numpy").ones(0))):
    try:
        with device.current():
            action()
    except DeviceOutOfMemory as error:
        print(error)
try:
    device.reserve("y", 8)
except EnvironmentLacks as error:
    print(error)
"""
    )
    assert run_on_host_driver(code).splitlines() == [
        "cuMemAlloc_v2: the GPU is out of memory; use a smaller batch or free the GPU",
        "cuMemAlloc_v2 failed with CUDA_ERROR_INVALID_CONTEXT (201)",
    ]


@pytest.mark.gpu
def test_a_round_trip_through_a_real_gpu() -> None:
    device = Device(CudaDriver())
    for rows in (3, 100_000, 0, 7):
        there = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
        back = np.empty_like(there)
        with device.current():
            address = device.reserve("x", there.nbytes)
            device.upload(address, there)
            device.download(back, address)
            device.synchronize()
        np.testing.assert_array_equal(there, back)
    device.close()
