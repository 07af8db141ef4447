"""A deserialized plan, and how execution contexts are made of it: where TensorRT and TensorRT-RTX differ."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tnm_pipeline.engines.backends.runtime_cache import read_runtime_cache, runtime_cache_path, write_runtime_cache
from tnm_pipeline.engines.backends.tensorrt_runtime import logger_of
from tnm_pipeline.engines.errors import ArtifactRejected, EnvironmentLacks
from tnm_pipeline.engines.manifest import Manifest


class TensorRTEngine:
    """A plan in its runtime. `context` may be called by any number of threads, the rest by one.

    Every method must run inside a current CUDA context.

    Args:
        trt: The module of the runtime that the manifest names.
        manifest: The manifest of the plan.
        plan: Its bytes.
        gpu: The name of the GPU that runs it.
        graphs: Whether CUDA graphs are wanted.

    Attributes:
        captures_itself: The runtime makes CUDA graphs by itself; nobody else needs to.
        scratch: Bytes of device memory that whoever makes contexts gives to each, 0 where the runtime allocates them.
            Contexts that never run at the same time may have the same.

    Raises:
        EnvironmentLacks: The runtime refuses the plan.
        ArtifactRejected: The engine's inputs and outputs are not the manifest's.
    """

    def __init__(self, trt: Any, manifest: Manifest, plan: bytes, *, gpu: str, graphs: bool) -> None:
        self._trt = trt
        self._manifest = manifest
        self._graphs = graphs
        self._runtime: Any = None
        self._engine: Any = None
        self._runtime_cache: Any = None
        self._cached = b""  # what the file has
        self._cache_path: Path | None = None
        logger, self._complaints = logger_of(manifest.backend)
        try:
            self._runtime = self._made(trt.Runtime(logger), "a runtime")
            if manifest.version_compatible:
                self._runtime.engine_host_code_allowed = True  # that of its own release; the manifest vouches for it
            self._engine = self._made(self._runtime.deserialize_cuda_engine(plan), "an engine")
            self._check_tensors()
        except BaseException:
            self.close()
            raise
        self.captures_itself = manifest.backend == "tensorrt_rtx"
        self.scratch = 0 if self.captures_itself else int(self._engine.device_memory_size_v2)
        if self.captures_itself:
            self._cache_path = runtime_cache_path(manifest, str(trt.__version__), gpu)
            self._load_runtime_cache(self._cache_path)

    def context(self, scratch: int) -> Any:
        """A new execution context.

        Args:
            scratch: The address of `self.scratch` bytes, aligned to 256, that no other running context uses.

        Raises:
            EnvironmentLacks: The runtime does not make one.
        """
        if self.captures_itself:
            return self._made(self._engine.create_execution_context(self._configuration()), "a context")
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._made(self._engine.create_execution_context(strategy), "a context")
        context.set_device_memory(scratch, self.scratch)
        return context

    def keep_runtime_cache(self) -> None:
        """Write the kernels that were compiled so far to the cache file; a failure is a warning."""
        if self._runtime_cache is None or self._cache_path is None:
            return
        content = bytes(self._runtime_cache.serialize() or b"")
        if content in (b"", self._cached):
            return
        try:
            write_runtime_cache(self._cache_path, content)
        except OSError as error:
            _warn(f"compiled kernels of {self._manifest.artifact} are not kept for the next load: {error}")
        self._cached = content

    def describe(self) -> dict[str, object]:
        """The file of compiled kernels and its bytes, for TensorRT-RTX."""
        if self._cache_path is None:
            return {}
        return {"runtime_cache": str(self._cache_path), "runtime_cache_bytes": len(self._cached)}

    def close(self) -> None:
        """Free the engine, then the runtime; contexts are gone by now."""
        self._runtime_cache = None
        self._engine = None
        self._runtime = None

    def _configuration(self) -> Any:
        """One for each context: it keeps what it is given."""
        config = self._engine.create_runtime_config()
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._graphs else strategies.DISABLED
        if self._runtime_cache is not None:
            config.set_runtime_cache(self._runtime_cache)
        return config

    def _load_runtime_cache(self, path: Path) -> None:
        cache = self._engine.create_runtime_config().create_runtime_cache()
        try:
            content = read_runtime_cache(path)
        except OSError as error:
            _warn(f"compiled kernels of {self._manifest.artifact} are not read, and are compiled again: {error}")
            content = None
        # Refused where release, GPU or driver differ: kernels are then compiled again, and the file is replaced.
        if content is not None and cache.deserialize(content):
            self._cached = content
        self._runtime_cache = cache

    def _made(self, thing: Any, what: str) -> Any:
        """TensorRT reports failure as None and says why only to its logger."""
        if thing is None:
            facts = self._manifest
            raise EnvironmentLacks(
                f"{facts.backend} cannot make {what} of {facts.artifact} (built with {facts.backend_version}): "
                f"{self._complaints}. Rebuild it on this machine with `tnm-pipeline export --trt`"
            )
        return thing

    def _check_tensors(self) -> None:
        """The engine's own names, dtypes and ranks must be the manifest's, in any order, and all on the GPU."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        on_host = [name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]
        if on_host:
            raise ArtifactRejected(
                f"{self._manifest.artifact} reads {', '.join(on_host)} on the CPU, to compute sizes from values: such "
                "plans are not served. Load the source ONNX instead"
            )
        for mode, side, specs in (
            (trt.TensorIOMode.INPUT, "inputs", self._manifest.inputs),
            (trt.TensorIOMode.OUTPUT, "outputs", self._manifest.outputs),
        ):
            stated = sorted((spec.name, spec.dtype, len(spec.shape)) for spec in specs)
            actual = sorted(
                (name, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, len(engine.get_tensor_shape(name)))
                for name in names
                if engine.get_tensor_mode(name) == mode
            )
            if stated != actual:
                raise ArtifactRejected(
                    f"the plan's {side} (name, dtype, rank) are {actual}, its manifest states {stated}. "
                    "Write both again with `tnm-pipeline export --trt`"
                )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
