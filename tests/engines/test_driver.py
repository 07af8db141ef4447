import subprocess
import sys

from tnm_pipeline.engines.driver import probe


def test_the_probe_answers_on_any_machine() -> None:
    found = probe()
    assert (found.reason is None) == bool(found.gpus)
    for gpu in found.gpus:
        assert gpu.name
        assert "." in gpu.compute_capability


def test_without_a_driver_library_the_reason_says_so() -> None:
    code = """
import ctypes
def absent(name):
    raise OSError(f"{name}: cannot open shared object file")
ctypes.CDLL = absent
from tnm_pipeline.engines.driver import probe
print(probe())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("Driver(cuda_version=None, gpus=(), reason='no NVIDIA driver is installed (")


def test_asking_imports_no_runtime() -> None:
    code = """
import sys
import tnm_pipeline.engines
tnm_pipeline.engines.driver.probe()
print(sorted({"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
