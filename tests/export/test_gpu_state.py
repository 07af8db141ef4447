import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tnm_pipeline.export.gpu_state import GpuState, disturbance

READ = "import json, dataclasses; from tnm_pipeline.export.gpu_state import read; state = read(); "
READ += "print(json.dumps(state and dataclasses.asdict(state)))"
BUSY = {
    "HOST_NVML_REASONS": "0x27",  # idle, clocks that somebody set, power limit, software thermal limit
    "HOST_NVML_POWER_MS": "5000000",
    "HOST_NVML_THERMAL_MS": "7",
    "HOST_NVML_BOARD_MS": "0",
    "HOST_NVML_CLOCK": "1410",
    "HOST_NVML_MAX_CLOCK": "1980",
    "HOST_NVML_CELSIUS": "84",
    "HOST_NVML_PROCESSES": "3",
    "HOST_NVML_MIG": "0",
}
Read = Callable[..., Any]


def compiled(folder: Path, *options: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stand-in driver")
    tests = Path(__file__).parents[1]
    for source, library in (("engines/host_driver.c", "libcuda.so.1"), ("export/host_nvml.c", "libnvidia-ml.so.1")):
        command = [compiler, "-shared", "-fPIC", *options, "-o", str(folder / library), str(tests / source)]
        subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def read_on(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Reads the state in a process whose driver libraries are stand-ins; options are the compiler's."""

    def run(*options: str, **environment: str) -> Any:
        folder = tmp_path_factory.getbasetemp() / f"nvml{''.join(options)}"
        if not folder.exists():
            folder.mkdir()
            compiled(folder, *options)
        settings = os.environ | {"LD_LIBRARY_PATH": str(folder), "HOST_DRIVER_CAPABILITY": "8.9"} | environment
        done = subprocess.run([sys.executable, "-c", READ], env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_all_that_a_driver_tells_is_read(read_on: Read) -> None:
    state = read_on(**BUSY)
    assert state.pop("at_ns") > 0
    assert state == {
        "slowed_by": ["power limit", "software thermal limit"],
        "slowed_ns": {"power limit": 5_000_000_000_000, "thermal limit": 7_000_000, "board limit": 0},
        "clock_mhz": 1410,
        "max_clock_mhz": 1980,
        "temperature_c": 84,
        "processes": 3,
        "mig": False,
    }


def test_what_a_driver_does_not_tell_is_missing(read_on: Read) -> None:
    state = read_on("-DOLD", HOST_NVML_PROCESSES="0")
    assert (state["processes"], state["mig"], state["clock_mhz"], state["slowed_ns"]) == (0, None, None, {})
    assert state["slowed_by"] == []


@pytest.mark.parametrize(
    "failure", [{"HOST_NVML_FAILS": "1"}, {"HOST_DRIVER_NO_GPU": "1", "HOST_DRIVER_INIT_FAILS": "100"}]
)
def test_a_driver_that_does_not_start_is_no_state(read_on: Read, failure: dict[str, str]) -> None:
    assert read_on(**BUSY, **failure) is None


def test_without_a_driver_there_is_no_state() -> None:
    code = "import sys; from tnm_pipeline.export.gpu_state import read; sys.exit(read() is not None)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode == 0


def state(seconds: float, **changes: Any) -> GpuState:
    values: dict[str, Any] = {
        "at_ns": int(seconds * 1e9),
        "slowed_by": (),
        "slowed_ns": {"power limit": 10**15, "thermal limit": 0},
        "clock_mhz": 1410,
        "max_clock_mhz": 1980,
        "temperature_c": 84,
        "processes": 1,
        "mig": False,
    }
    return GpuState(**(values | changes))


def test_a_quiet_gpu_disturbs_nothing() -> None:
    tolerated = {"power limit": 10**15 + 5_000_000, "thermal limit": 0}  # 5 ms of a second
    assert disturbance(state(1), state(2, slowed_ns=tolerated)) is None
    assert disturbance(None, state(2)) is None
    assert disturbance(state(1), None) is None
    nothing_told: dict[str, Any] = {
        "slowed_ns": {},
        "clock_mhz": None,
        "max_clock_mhz": None,
        "temperature_c": None,
        "processes": None,
    }
    assert disturbance(state(1, **nothing_told), state(2, **nothing_told)) is None


def test_time_at_a_limit_between_two_looks_is_seen() -> None:
    """Neither look itself meets the slowdown."""
    found = disturbance(state(1), state(3, slowed_ns={"power limit": 10**15 + 500_000_000, "thermal limit": 0}))
    assert found is not None
    assert found.key == "gpu-throttled"
    assert "power limit in 25% of the time; 1410 of 1980 MHz, 84 C" in found.message


@pytest.mark.parametrize("when", [0, 1])
def test_a_limit_at_either_end_is_seen(when: int) -> None:
    looks = [state(1), state(2)]
    looks[when] = state(1 + when, slowed_by=("hardware thermal limit",))
    found = disturbance(*looks)
    assert found is not None
    assert "hardware thermal limit; 1410" in found.message


@pytest.mark.parametrize("when", [0, 1])
def test_company_is_named_before_heat(when: int) -> None:
    looks = [state(1, slowed_by=("power limit",)), state(2)]
    looks[when] = state(1 + when, processes=3)
    found = disturbance(*looks)
    assert found is not None
    assert found.key == "gpu-shared"
    assert "3 processes" in found.message
