"""The stand-in for TensorRT-RTX: that of TensorRT, with runtime configurations and a cache of compiled kernels.

A context "compiles" its kernel where the cache has none: it prints so.
"""

import enum
from typing import Any

import tensorrt
from tensorrt import (  # noqa: F401 - the same names in both
    ExecutionContextAllocationStrategy,
    ILogger,
    TensorIOMode,
    TensorLocation,
    nptype,
)

__version__ = "1.7.1.116"


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        if blob != b"kernels":
            return False
        self.content = blob
        return True


class RuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine(tensorrt.Engine):  # type: ignore[misc]  # to mypy, tensorrt is the real one
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: RuntimeConfig) -> "Context":
        tensorrt.say(how.cuda_graph_strategy.name)
        return Context(self.logger, how.cache)


class Runtime(tensorrt.Runtime):  # type: ignore[misc]  # as above
    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return Engine(self.logger, host=False) if plan == b"a plan" else super().deserialize_cuda_engine(plan)


class Context(tensorrt.Context):  # type: ignore[misc]  # as above
    def __init__(self, logger: ILogger, cache: RuntimeCache | None) -> None:
        super().__init__(logger, needs_scratch=False)
        self.cache = cache

    def execute_async_v3(self, stream: int) -> bool:
        if self.cache is not None and not self.cache.content:
            tensorrt.say("compiles")
            self.cache.content = b"kernels"
        return bool(super().execute_async_v3(stream))
