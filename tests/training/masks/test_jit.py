"""Compiling: what is kept on disk, what is said, and that the machine's vector width does not change a mask."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tnm_pipeline.training.masks.jit import compiled

SOLVE = """
import hashlib, torch
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
digest = hashlib.sha256()
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for text in ("2:4-T", "4:8-T", "4:8"):
        weight = torch.randn(48, 700, generator=g).to(dtype)
        digest.update(solve(weight, Pattern.parse(text)).numpy().tobytes())
print(digest.hexdigest())
"""


def run_solve(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    return subprocess.run([sys.executable, "-c", SOLVE], capture_output=True, text=True, check=True, env=variables)


@pytest.mark.slow
def test_kernels_are_compiled_once_and_a_long_compilation_is_announced(tmp_path: Path) -> None:
    cold = run_solve(tmp_path)
    assert "compiling the 4:8-T mask kernel, once per machine" in cold.stderr
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert stored
    warm = run_solve(tmp_path)
    assert warm.stderr == ""
    assert warm.stdout == cold.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == stored


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_a_processor_with_narrower_vectors_gives_the_same_masks(tmp_path: Path, processor: str) -> None:
    """Without AVX-512, and without AVX or float16 conversion at all: LLVM splits the vectors."""
    if "x86" not in os.uname().machine:
        pytest.skip("the processors named are x86")
    narrow = run_solve(tmp_path, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES="")
    assert narrow.stdout == run_solve(tmp_path).stdout


def test_without_a_folder_for_the_cache_kernels_still_compile(caplog: pytest.LogCaptureFixture) -> None:
    namespace: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", namespace)  # noqa: S102  # code without a file has nowhere to be cached
    with caplog.at_level(logging.WARNING):
        double = compiled(namespace["double"])
    assert double(21) == 42
    assert "NUMBA_CACHE_DIR" in caplog.text
