"""TensorRT and TensorRT-RTX: the part of the API that both share, on one context that changes profiles.

The caller has probed the driver: a `Runtime` made on a machine without one crashes the process.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnm_pipeline.engines.backends import Array
from tnm_pipeline.engines.cuda import CudaDriver, Device
from tnm_pipeline.engines.driver import Driver
from tnm_pipeline.engines.errors import ArtifactRejected, EnvironmentLacks, FeedError
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.engines.pool import Pool
from tnm_pipeline.engines.tensors import Ranges, TensorSpec

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # module -> what pip installs


class TensorRTBackend:
    """A verified plan in the runtime that its manifest names.

    Args:
        manifest: The manifest of the plan.
        plan: The bytes that the manifest describes.
        driver: What the driver probe found.
        limits: Of its session.

    Raises:
        EnvironmentLacks: No GPU, another GPU than the plan was built for, no runtime or one of another
            release, or the runtime refuses the plan.
        ArtifactRejected: The engine's inputs and outputs are not the manifest's.
    """

    device = "cuda"

    def __init__(self, manifest: Manifest, plan: bytes, *, driver: Driver, limits: Limits) -> None:
        check_gpu(manifest, driver)
        trt = _runtime_module(manifest)
        self._manifest = manifest
        self._log: list[str] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._profile = 0  # what a new context has
        self.version = str(trt.__version__)
        self._turns = Pool([None], limits.patience)
        self._device = Device(CudaDriver())
        try:
            with self._device.current():
                self._logger = _collector(trt, self._log)  # TensorRT keeps a bare pointer to it
                self._runtime = self._made(trt.Runtime(self._logger), "a runtime")
                self._engine = self._made(self._runtime.deserialize_cuda_engine(plan), "an engine")
                self._check_tensors(trt)
                self._context = self._made(self._engine.create_execution_context(), "a context")
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Array], deadline: float | None = None) -> dict[str, Array]:
        """See `Backend.run`."""
        profile = covering_profile(self._manifest.profiles, self._manifest.inputs, feeds)
        with self._turns.lent(deadline), self._device.current():
            self._log.clear()
            try:
                self._select(profile)
                for name, array in feeds.items():
                    self._feed(name, array)
                return self._execute()
            finally:
                self._device.synchronize()  # also on an error: queued copies still use the arrays

    def close(self) -> None:
        """Free the context, the engine and the runtime, in this order, then the device memory."""
        with self._device.current():
            self._context = None
            self._engine = None
            self._runtime = None
        self._device.close()

    def _select(self, profile: int) -> None:
        """Change the context's profile where a call needs another; every input's shape is set again after it."""
        if profile == self._profile:
            return
        if not self._context.set_optimization_profile_async(profile, self._device.stream):
            raise EnvironmentLacks(f"TensorRT does not change to profile {profile}: {self._complaints()}")
        self._profile = profile

    def _feed(self, name: str, array: Array) -> None:
        if not self._context.set_input_shape(name, array.shape):
            raise FeedError(f"TensorRT refuses input {name} of shape {array.shape}: {self._complaints()}")
        self._device.upload(self._bind(name, array.nbytes), array)

    def _execute(self) -> dict[str, Array]:
        """Queue the network and the copies of its outputs, which are filled after `synchronize`."""
        outputs = {spec.name: self._empty_output(spec) for spec in self._manifest.outputs}
        addresses = {name: self._bind(name, array.nbytes) for name, array in outputs.items()}
        if not self._context.execute_async_v3(self._device.stream):
            raise EnvironmentLacks(f"TensorRT did not run {self._manifest.artifact}: {self._complaints()}")
        for name, array in outputs.items():
            self._device.download(array, addresses[name])
        return outputs

    def _empty_output(self, spec: TensorSpec) -> Array:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) < 0:
            raise ArtifactRejected(
                f"the shape of output {spec.name} is {shape}: it depends on the data, and only plans whose "
                "output shapes follow from the input shapes are served. Load the source ONNX instead"
            )
        return np.empty(shape, spec.dtype)

    def _bind(self, name: str, size: int) -> int:
        address = self._device.reserve(name, size)
        if not self._context.set_tensor_address(name, address):
            raise EnvironmentLacks(f"TensorRT refuses the buffer of {name}: {self._complaints()}")
        return address

    def _made(self, thing: Any, what: str) -> Any:
        """TensorRT reports failure as None and says why only to its logger."""
        if thing is None:
            facts = self._manifest
            raise EnvironmentLacks(
                f"{facts.backend} cannot make {what} of {facts.artifact} (built with {facts.backend_version}): "
                f"{self._complaints()}. Rebuild it on this machine with `tnm-pipeline export --trt`"
            )
        return thing

    def _complaints(self) -> str:
        return "; ".join(self._log) or "it gives no reason"

    def _check_tensors(self, trt: Any) -> None:
        """The engine's own names, dtypes and ranks must be the manifest's, in any order."""
        for mode, side, specs in (
            (trt.TensorIOMode.INPUT, "inputs", self._manifest.inputs),
            (trt.TensorIOMode.OUTPUT, "outputs", self._manifest.outputs),
        ):
            stated = sorted((spec.name, spec.dtype, len(spec.shape)) for spec in specs)
            actual = _tensors(trt, self._engine, mode)
            if stated != actual:
                raise ArtifactRejected(
                    f"the plan's {side} (name, dtype, rank) are {actual}, its manifest states {stated}. "
                    "Write both again with `tnm-pipeline export --trt`"
                )


def check_gpu(manifest: Manifest, driver: Driver) -> None:
    """Refuse a machine whose first GPU is not one the plan was built for; imports nothing.

    Args:
        manifest: The manifest of the plan.
        driver: What the driver probe found.

    Raises:
        EnvironmentLacks: There is no GPU, or its compute capability is not in the manifest.
    """
    if not driver.gpus:
        raise EnvironmentLacks(
            f"{manifest.artifact} is a {manifest.backend} plan and needs a GPU: {driver.reason}. Run it on a machine "
            f"with an NVIDIA driver and a GPU of compute capability {', '.join(manifest.compute_capabilities)}"
        )
    gpu, built_for = driver.gpus[0], manifest.compute_capabilities
    if gpu.compute_capability not in built_for:
        raise EnvironmentLacks(
            f"{manifest.artifact} was built for compute capability {', '.join(built_for)}, and {gpu.name} "
            f"has {gpu.compute_capability}: build it for this GPU with `tnm-pipeline export --trt --set "
            f"'trt.compute_capabilities=[\"{gpu.compute_capability}\"]'`"
        )


def covering_profile(profiles: Sequence[Ranges], inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> int:
    """The first optimisation profile that holds all sizes of a call.

    Args:
        profiles: Those of the plan; none for fixed sizes.
        inputs: What the plan takes.
        feeds: Every input by name, each of the rank that `inputs` states.

    Returns:
        Its index; 0 for a plan of fixed sizes.

    Raises:
        FeedError: No profile holds all of them, even though the profiles together may span each.
    """
    sizes = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    for index, profile in enumerate(profiles):
        if all(low <= sizes[dim] <= high for dim, (low, _, high) in profile.items()):
            return index
    if not profiles:
        return 0
    built_for = "; ".join(
        f"profile {index}: " + ", ".join(f"{dim} {low} to {high}" for dim, (low, _, high) in profile.items())
        for index, profile in enumerate(profiles)
    )
    raise FeedError(
        f"no profile of the plan holds {', '.join(f'{dim} = {size}' for dim, size in sizes.items())} ({built_for}): "
        "split or pad the inputs, or rebuild with a profile for these sizes"
    )


def _runtime_module(manifest: Manifest) -> Any:
    """Import what the manifest names: a plan runs only in the release that built it.

    Source: NVIDIA, "Engine Compatibility", for both TensorRT and TensorRT-RTX.
    """
    package, built_with = _PACKAGES[manifest.backend], manifest.backend_version
    release = ".".join(built_with.split(".")[:2])
    install = f"pip install '{package}=={release}.*'"
    try:
        trt: Any = importlib.import_module(manifest.backend)
    except (ImportError, OSError) as error:  # OSError: a library of the package cannot be loaded
        raise EnvironmentLacks(
            f"{manifest.artifact} needs {manifest.backend} {built_with}: {error}. Run `{install}`"
        ) from error
    if trt.__version__.split(".")[:2] != built_with.split(".")[:2]:
        raise EnvironmentLacks(
            f"{manifest.artifact} was built with {manifest.backend} {built_with}, and {trt.__version__} is "
            f"installed: run `{install}`, or rebuild it with `tnm-pipeline export --trt`"
        )
    return trt


def _collector(trt: Any, log: list[str]) -> Any:
    """A TensorRT logger that keeps errors for the exception and drops the rest."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base is known only once the module is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding refuses super()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                log.append(message)

    return Collector()


def _tensors(trt: Any, engine: Any, mode: Any) -> list[tuple[str, str, int]]:
    """Sorted name, numpy dtype and rank of the engine's inputs or outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return sorted(
        (name, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, len(engine.get_tensor_shape(name)))
        for name in names
        if engine.get_tensor_mode(name) == mode
    )
