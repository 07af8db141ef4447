"""The calls of TensorRT that the package makes, computing output = 2 * input at the addresses that it is given.

Put this folder on PYTHONPATH, and `host_driver.c` where `libcuda.so.1` is looked for: the products are queued on its
streams. It proves our side; only `pytest -m gpu` proves TensorRT's. Batches of some sizes misbehave:

- 4 does not run; 5 has an output whose shape depends on the data; 6 is refused; 7 cannot be captured in a graph;
- profile 2 cannot be selected.
"""

import ctypes
import enum
import math
import sys
import threading
from typing import Any

import numpy as np

__version__ = "10.13.2.6"

_driver = ctypes.CDLL("libcuda.so.1")
_driver.host_driver_double.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
_driver.cuStreamSynchronize.argtypes = (ctypes.c_void_p,)


def say(line: str) -> None:
    """What a test reads of the calls that were made."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 0, 1


class TensorLocation(enum.Enum):
    DEVICE, HOST = 0, 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def log(self, severity: "ILogger.Severity", message: str) -> None:
        raise NotImplementedError


def nptype(kind: type) -> type:
    return kind


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if plan == b"a plan with code" and not self.engine_host_code_allowed:
            self.logger.log(ILogger.Severity.ERROR, "host code is not allowed")
            return None
        if plan.startswith(b"a plan"):
            return Engine(self.logger, host=plan == b"a plan of shapes")
        self.logger.log(ILogger.Severity.WARNING, "a warning")
        self.logger.log(ILogger.Severity.ERROR, "magic tag does not match")
        return None


class Engine:
    num_io_tensors = 2
    device_memory_size_v2 = 4096

    def __init__(self, logger: ILogger, host: bool) -> None:
        self.logger = logger
        self.host = host

    def get_tensor_name(self, index: int) -> str:
        return ("output", "input")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[name.upper()]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if self.host and name == "input" else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> type:
        return np.float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 8)

    def create_execution_context(self, how: Any) -> "Context":
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self.logger, needs_scratch=True)


class Context:
    """A graph of it is undefined once it changes: a launch while capturing freezes it, and every change then fails."""

    def __init__(self, logger: ILogger, needs_scratch: bool) -> None:
        self.logger, self.addresses = logger, dict[str, int]()
        self.scratch: int | None = None if needs_scratch else 0
        self.shape: tuple[int, ...] = ()
        self.frozen = False
        self.busy = threading.Lock()

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= Engine.device_memory_size_v2
        self.scratch = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        say(f"profile {index}")
        return not self.frozen and stream != 0 and index != 2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if shape[0] == 6:
            self.logger.log(ILogger.Severity.ERROR, "six is right out")
        self.shape = shape
        return not self.frozen and shape[0] != 6

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 8) if self.shape[0] == 5 else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.frozen and address != 0 and address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch is not None, "a context without memory of its own was given none"
        assert self.busy.acquire(blocking=False), "one context runs for two threads"
        try:
            if self.shape[0] == 4:
                return False
            if self.shape[0] == 7 and _driver.cuStreamSynchronize(stream):
                self.logger.log(ILogger.Severity.ERROR, "seven waits for the GPU halfway")
                return False
            count = math.prod(self.shape)
            self.frozen = bool(_driver.host_driver_is_capturing())
            return not _driver.host_driver_double(self.addresses["output"], self.addresses["input"], count, stream)
        finally:
            self.busy.release()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the stand-in has no {name}: the package calls more of TensorRT than it did")
