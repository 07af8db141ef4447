"""One place in the pool of a TensorRT session: a stream, buffers, an execution context, and its CUDA graphs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tnm_pipeline.engines.arrays import Array, CudaArray, DeviceArray, Feed
from tnm_pipeline.engines.backends.tensorrt_engine import TensorRTEngine
from tnm_pipeline.engines.backends.tensorrt_runtime import Complaints
from tnm_pipeline.engines.cuda import CudaDriver, CudaError
from tnm_pipeline.engines.device import Device
from tnm_pipeline.engines.errors import ArtifactRejected, DeviceOutOfMemory, EnvironmentLacks, FeedError, RunFailed
from tnm_pipeline.engines.graphs import CaptureRefused, CudaGraph, GraphCache, capture
from tnm_pipeline.engines.manifest import Manifest

_ALIGNMENT = 256  # bytes; TensorRT asks for it of every address
_SCRATCH = ""  # no tensor has an empty name

Shape: TypeAlias = tuple[int, ...]
# Profile, whether outputs stay on the GPU, and for each input its shape and its address where the caller owns it.
_Key: TypeAlias = tuple[int, bool, tuple[tuple[Shape, int], ...]]


@dataclass(frozen=True)
class _Placed:
    """Where a tensor is. `staging` is the page-locked memory that it is copied from or to, None without a copy."""

    shape: Shape
    address: int
    staging: Any


@dataclass(frozen=True)
class _Captured:
    """A graph, and the context whose state it captured: changing that one would make the graph undefined.

    Source: NVIDIA, TensorRT developer guide, "CUDA Graphs".
    """

    graph: CudaGraph
    context: Any
    outputs: Mapping[str, _Placed]

    def destroy(self) -> None:
        self.graph.destroy()


class ExecutionContext:
    """Answers one call at a time; different ones answer at the same time.

    Args:
        driver: The driver.
        engine: The plan.
        manifest: Its manifest.
        complaints: What TensorRT says of a call that fails.
        graphs: CUDA graphs to keep, 0 for none or where the engine's runtime keeps its own.
    """

    def __init__(
        self, driver: CudaDriver, engine: TensorRTEngine, manifest: Manifest, complaints: Complaints, graphs: int
    ) -> None:
        self._driver = driver
        self._engine = engine
        self._manifest = manifest
        self._complaints = complaints
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in manifest.outputs}
        self._graphs: GraphCache[_Key, _Captured] = GraphCache(graphs)
        self._growths = 0
        self._profile = 0  # what a new context has
        self._plain: Any = None
        self._device = Device(driver)
        try:
            with self._device.current():
                self._plain = self._new_context()
        except BaseException:
            self.close()
            raise

    def run(self, profile: int, feeds: Mapping[str, Feed], *, on_device: bool) -> dict[str, Any]:
        """Run the network once.

        Args:
            profile: The optimisation profile that holds the sizes of `feeds`.
            feeds: Every input by name.
            on_device: Leave the outputs on the GPU.

        Returns:
            Numpy arrays, or `DeviceArray` with `on_device`, all complete.

        Raises:
            As `Backend.run`.
        """
        with self._device.current():
            try:
                inputs = {name: self._place(name, feed) for name, feed in feeds.items()}
                outputs = self._launch(profile, feeds, inputs, on_device)
                lasting = self._lasting(outputs) if on_device else {}
            finally:
                self._device.synchronize()  # also on an error: queued copies still use the arrays
            return lasting if on_device else self._copied_out(outputs)

    def describe(self) -> tuple[int, tuple[str, ...]]:
        """CUDA graphs that are kept, and why others could not be made."""
        return len(self._graphs), self._graphs.refusals

    def close(self) -> None:
        """Free the graphs and the contexts, then the memory."""
        with self._device.current():
            self._graphs.clear()
            self._plain = None
        self._device.close()

    def _new_context(self) -> Any:
        size = self._engine.scratch
        return self._engine.context(self._device.reserve(_SCRATCH, size) if size else 0)

    def _place(self, name: str, feed: Feed) -> _Placed:
        """Have an input where TensorRT can read it once everything queued by then is done."""
        if not isinstance(feed, CudaArray):
            staging = self._device.staging(name, feed.nbytes)
            np.copyto(staging.view(feed.dtype).reshape(feed.shape), feed)
            return _Placed(feed.shape, self._device.reserve(name, feed.nbytes), staging)
        if not feed.nbytes:
            return _Placed(feed.shape, self._device.reserve(name, 0), None)
        self._check_device(name, feed)
        if feed.stream is not None:
            self._device.wait_for(feed.stream)
        if feed.address % _ALIGNMENT == 0:
            return _Placed(feed.shape, feed.address, None)
        own = self._device.reserve(name, feed.nbytes)
        self._device.copy(own, feed.address, feed.nbytes)
        return _Placed(feed.shape, own, None)

    def _check_device(self, name: str, feed: CudaArray) -> None:
        try:
            here = self._device.holds(feed.address)
        except CudaError as error:
            raise FeedError(
                f"input {name} is said to be on a GPU, where CUDA knows no such address: {error}"
            ) from error
        if not here:
            raise FeedError(f"input {name} is on another GPU than the session, which runs on GPU 0: copy it there")

    def _launch(
        self, profile: int, feeds: Mapping[str, Feed], inputs: Mapping[str, _Placed], on_device: bool
    ) -> Mapping[str, _Placed]:
        """Queue everything, by a graph where there is one. Where the outputs will be."""
        self._drop_graphs_of_moved_buffers()
        key = (
            profile,
            on_device,
            tuple(
                (feed.shape, inputs[name].address if isinstance(feed, CudaArray) else 0) for name, feed in feeds.items()
            ),
        )
        captured = self._graphs.get(key)
        if captured is not None:
            captured.graph.launch(self._device.stream)
            return captured.outputs
        context = self._context_to_capture(key) if self._graphs.worth(key) else None
        if context is not None:
            return self._launch_and_capture(context, key, inputs, on_device)
        self._select(self._plain, profile, self._profile)
        self._profile = profile
        outputs = self._bind(self._plain, inputs, on_device)
        self._queue(self._plain, inputs, outputs)
        return outputs

    def _context_to_capture(self, key: _Key) -> Any | None:
        """A context of its own for a graph; None where there is no room for one."""
        try:
            return self._new_context()
        except (EnvironmentLacks, DeviceOutOfMemory) as error:
            self._refuse(key, str(error))
            return None

    def _launch_and_capture(
        self, context: Any, key: _Key, inputs: Mapping[str, _Placed], on_device: bool
    ) -> Mapping[str, _Placed]:
        """Queue everything on a context that stays as it is from then on, and keep a graph of it."""
        self._select(context, key[0], 0)
        outputs = self._bind(context, inputs, on_device)
        # Not captured: TensorRT puts work off from a change of shapes to the first launch after it.
        self._queue(context, inputs, outputs)
        self._device.synchronize()
        self._drop_graphs_of_moved_buffers()
        try:
            graph = capture(self._driver, self._device.stream, lambda: self._queue(context, inputs, outputs))
        except CaptureRefused as error:
            self._refuse(key, str(error))
        else:
            self._graphs.keep(key, _Captured(graph, context, outputs))
        return outputs

    def _refuse(self, key: _Key, reason: str) -> None:
        self._graphs.refuse(key, f"shapes {', '.join(str(shape) for shape, _ in key[2])}: {reason}")

    def _drop_graphs_of_moved_buffers(self) -> None:
        if self._growths != self._device.growths:
            self._graphs.clear()
            self._growths = self._device.growths

    def _select(self, context: Any, profile: int, current: int) -> None:
        """Change the profile where a call needs another; every input's shape is set again after it."""
        if profile != current and not context.set_optimization_profile_async(profile, self._device.stream):
            raise RunFailed(f"TensorRT does not change to profile {profile}: {self._complaints}")

    def _bind(self, context: Any, inputs: Mapping[str, _Placed], on_device: bool) -> Mapping[str, _Placed]:
        for name, placed in inputs.items():
            if not context.set_input_shape(name, placed.shape):
                raise FeedError(f"TensorRT refuses input {name} of shape {placed.shape}: {self._complaints}")
        outputs = {name: self._place_output(context, name, on_device) for name in self._dtypes}
        for name, placed in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, placed.address):
                raise RunFailed(f"TensorRT refuses the buffer of {name}: {self._complaints}")
        return outputs

    def _place_output(self, context: Any, name: str, on_device: bool) -> _Placed:
        shape = tuple(context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise ArtifactRejected(
                f"the shape of output {name} is {shape}: it depends on the data, and only plans whose "
                "output shapes follow from the input shapes are served. Load the source ONNX instead"
            )
        size = math.prod(shape) * self._dtypes[name].itemsize
        return _Placed(shape, self._device.reserve(name, size), None if on_device else self._device.staging(name, size))

    def _queue(self, context: Any, inputs: Mapping[str, _Placed], outputs: Mapping[str, _Placed]) -> None:
        """Copies in, the network, copies out."""
        for placed in inputs.values():
            if placed.staging is not None:
                self._device.upload(placed.address, placed.staging)
        if not context.execute_async_v3(self._device.stream):
            raise RunFailed(f"TensorRT did not run {self._manifest.artifact}: {self._complaints}")
        for placed in outputs.values():
            if placed.staging is not None:
                self._device.download(placed.staging, placed.address)

    def _lasting(self, outputs: Mapping[str, _Placed]) -> dict[str, DeviceArray]:
        """Queue copies of the outputs to memory of their own: the buffers serve the next call."""
        lasting = {}
        for name, placed in outputs.items():
            array = DeviceArray.empty(self._driver, placed.shape, self._dtypes[name])
            self._device.copy(array.address, placed.address, array.nbytes)
            lasting[name] = array
        return lasting

    def _copied_out(self, outputs: Mapping[str, _Placed]) -> dict[str, Array]:
        return {
            name: placed.staging.view(self._dtypes[name]).reshape(placed.shape).copy()
            for name, placed in outputs.items()
        }
