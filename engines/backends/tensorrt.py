"""TensorRT and TensorRT-RTX: a pool of execution contexts, each with a stream, buffers and CUDA graphs of its own.

The caller has probed the driver: a `Runtime` made on a machine without one crashes the process.
"""

from collections.abc import Mapping
from typing import Any

from tnm_pipeline.engines.arrays import Feed
from tnm_pipeline.engines.backends.tensorrt_context import ExecutionContext
from tnm_pipeline.engines.backends.tensorrt_engine import TensorRTEngine
from tnm_pipeline.engines.backends.tensorrt_profiles import covering_profile, warm_sizes, zero_feeds
from tnm_pipeline.engines.backends.tensorrt_runtime import check_gpu, logger_of, runtime_module
from tnm_pipeline.engines.cuda import CudaDriver, PrimaryContext
from tnm_pipeline.engines.driver import Driver
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.engines.pool import Pool


class TensorRTBackend:
    """A verified plan in the runtime that its manifest names. Any number of threads.

    Since TensorRT 10, any number of contexts may use the same optimisation profile, so every context serves all of
    them. A fault inside a kernel (an illegal address) ends the CUDA context for the whole process, as everywhere.

    Args:
        manifest: The manifest of the plan.
        plan: The bytes that the manifest describes.
        driver: What the driver probe found.
        limits: Of its session.

    Raises:
        EnvironmentLacks: No GPU, another GPU than the plan was built for, no runtime or one of another
            release, or the runtime refuses the plan.
        ArtifactRejected: The engine's inputs and outputs are not the manifest's.
        DeviceOutOfMemory: The GPU has too little free memory for the weights and all contexts.
    """

    device = "cuda"

    def __init__(self, manifest: Manifest, plan: bytes, *, driver: Driver, limits: Limits) -> None:
        check_gpu(manifest, driver)
        trt = runtime_module(manifest)
        self.version = str(trt.__version__)
        self._manifest = manifest
        self._limits = limits
        self._engine: TensorRTEngine | None = None
        self._contexts: list[ExecutionContext] = []
        _, self._complaints = logger_of(manifest.backend)
        cuda = CudaDriver()
        self._primary = PrimaryContext(cuda)
        try:
            with self._primary.current(), self._complaints.of_this_call():
                engine = TensorRTEngine(trt, manifest, plan, gpu=driver.gpus[0].name, graphs=limits.graphs > 0)
                self._engine = engine
                graphs = 0 if engine.captures_itself else limits.graphs
                for _ in range(limits.contexts):
                    self._contexts.append(ExecutionContext(cuda, engine, manifest, self._complaints, graphs))
        except BaseException:
            self.close()
            raise
        self._pool = Pool(self._contexts, limits.patience)

    def run(
        self, feeds: Mapping[str, Feed], deadline: float | None = None, *, on_device: bool = False
    ) -> dict[str, Any]:
        """See `Backend.run`."""
        profile = covering_profile(self._manifest.profiles, self._manifest.inputs, feeds)
        with self._pool.lent(deadline) as context, self._complaints.of_this_call():
            return context.run(profile, feeds, on_device=on_device)

    def warm_up(self) -> None:
        """Run zeros of each profile's largest and best sizes on every context, before the first call.

        Twice each, so that a graph is there for the sizes that a plan was made for, and TensorRT-RTX has compiled
        their kernels, which are then kept for the next process.
        """
        assert self._engine is not None, "a session does not warm up what it closed"
        inputs, profiles = self._manifest.inputs, self._manifest.profiles
        for context in self._contexts:
            for sizes in warm_sizes(profiles, inputs):
                feeds = zero_feeds(inputs, sizes)
                profile = covering_profile(profiles, inputs, feeds)
                with self._complaints.of_this_call():
                    for _ in range(2):
                        context.run(profile, feeds, on_device=False)
        with self._primary.current():
            self._engine.keep_runtime_cache()

    def describe(self) -> dict[str, object]:
        """See `Backend.describe`."""
        assert self._engine is not None, "a session does not describe what it closed"
        kept = [context.describe() for context in self._contexts]
        graphs = "off" if not self._limits.graphs else "the runtime's" if self._engine.captures_itself else "captured"
        return {
            "contexts": len(self._contexts),
            "graphs": graphs,
            "graphs_kept": sum(count for count, _ in kept),
            "graphs_refused": sorted({reason for _, reasons in kept for reason in reasons}),
            **self._engine.describe(),
        }

    def close(self) -> None:
        """Free the contexts and their memory, then the engine and the runtime."""
        for context in self._contexts:
            context.close()
        self._contexts = []
        with self._primary.current():
            if self._engine is not None:
                self._engine.keep_runtime_cache()
                self._engine.close()
                self._engine = None
        self._primary.release()
