"""Run code in a process whose `libcuda.so.1` is `host_driver.c`: no GPU, and every call really made."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]


@pytest.fixture(scope="session")
def host_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the compiled stand-in driver."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the stand-in CUDA driver needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("host_driver.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", folder / "libcuda.so.1"], check=True
    )
    return folder


@pytest.fixture
def run_on_host_driver(host_driver: Path) -> Run:
    """`run(code, *arguments, **environment)`: stdout of a fresh Python that finds the stand-in driver first."""

    def run(code: str, *arguments: object, **environment: str) -> str:
        settings = {"HOST_DRIVER_CAPABILITY": "8.9", "LD_LIBRARY_PATH": str(host_driver), **environment}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
