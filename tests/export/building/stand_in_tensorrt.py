"""What a build asks of tensorrt, on top of tensorrt_rtx: one GPU, timing caches, sparse tactics, a runtime that loads.

Tests put this file on the path of the building process as `tensorrt`. It proves our side; only `pytest -m gpu` proves
TensorRT's.
"""

import importlib
import json
import os
from typing import Any

__version__ = "10.13.2.6"

_OWN = {"hardware_compatibility_level": None, "cache": None}

rtx: Any = importlib.import_module("tensorrt_rtx")


def __getattr__(name: str) -> Any:
    """The rest is shared."""
    return getattr(rtx, name)


class Config:
    """A configuration that knows no compute capabilities: it builds for the GPU of this machine."""

    def __init__(self, real: Any) -> None:
        real.num_compute_capabilities = 1
        real.set_compute_capability(rtx.ComputeCapability.SM89, 0)
        self.__dict__.update(_OWN, real=real)

    def __getattr__(self, name: str) -> Any:
        if "compute_capabilit" in name:
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(self.real, name, value)

    def create_timing_cache(self, content: bytes) -> bytearray:
        return bytearray(content)

    def set_timing_cache(self, cache: bytearray, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        cache = self.cache

        class Serialized:
            def serialize(self) -> bytes:
                return bytes(cache)

        return Serialized()


class Builder:
    """Adds an entry to the timing cache, and says which layers are sparse."""

    def __init__(self, logger: Any) -> None:
        self.real, self.logger = rtx.Builder(logger), logger

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def create_builder_config(self) -> Config:
        return Config(self.real.create_builder_config())

    def build_serialized_network(self, network: Any, config: Config) -> Any:
        plan = self.real.build_serialized_network(network, config.real)
        if config.cache is not None:
            config.cache += b"entry;"
        for text in (
            "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: first, second + leave",
            "(Sparsity) Chose 1 layer(s) using sparse tactics: second + leave",
        ):
            self.logger.log(rtx.ILogger.Severity.VERBOSE, text)
        return plan


class Runtime:
    """Loads anything; its engine inspector tells of one layer, with weights of type `STAND_IN_WEIGHTS`."""

    def __init__(self, logger: Any) -> None:
        self.layer = {"Name": "second + leave", "Weights": {"Type": os.environ["STAND_IN_WEIGHTS"], "Count": 256}}

    def deserialize_cuda_engine(self, plan: Any) -> "Runtime":
        return self

    def create_engine_inspector(self) -> "Runtime":
        return self

    def get_engine_information(self, form: Any) -> str:
        return json.dumps({"Layers": [self.layer], "Bindings": ["x", "y"]})
