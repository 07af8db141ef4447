"""ONNX Runtime with inputs and outputs that stay on the GPU, through its I/O binding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnm_pipeline.engines.arrays import CudaArray, DeviceArray, Feed
from tnm_pipeline.engines.cuda import CudaDriver, PrimaryContext


class DeviceRuns:
    """Runs of one ONNX Runtime session whose arrays are on GPU 0. Any number of threads.

    Args:
        session: An `onnxruntime.InferenceSession`.
        outputs: Names of its outputs.
        kind: ONNX Runtime's name for the device.
    """

    def __init__(self, session: Any, outputs: Sequence[str], kind: str = "cuda") -> None:
        self._session = session
        self._outputs = outputs
        self._kind = kind
        self._driver = CudaDriver()

    def run(self, feeds: Mapping[str, Feed], *, on_device: bool) -> dict[str, Any]:
        """Run the network once: CUDA arrays are read where they are, numpy arrays are copied there.

        Args:
            feeds: Every input by name.
            on_device: Leave the outputs on the GPU.

        Returns:
            Numpy arrays, or `DeviceArray` with `on_device`, all complete.

        Raises:
            What ONNX Runtime raises; CudaError where the stream of an input fails.
        """
        self._wait_for({feed.stream for feed in feeds.values() if isinstance(feed, CudaArray)} - {None})
        binding = self._session.io_binding()
        for name, feed in feeds.items():
            if isinstance(feed, CudaArray):
                binding.bind_input(name, self._kind, 0, feed.dtype.type, feed.shape, feed.address)
            else:
                binding.bind_cpu_input(name, feed)
        for name in self._outputs:
            binding.bind_output(name, self._kind if on_device else "cpu")
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if not on_device:
            return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))
        return {
            name: DeviceArray(
                value.data_ptr(),
                tuple(value.shape()),
                _dtype(value.data_type()),
                (value, binding),  # ONNX Runtime takes the memory back with these
                self._driver,
            )
            for name, value in zip(self._outputs, binding.get_outputs(), strict=True)
        }

    def _wait_for(self, streams: set[int | None]) -> None:
        """ONNX Runtime has a stream of its own, which cannot be told of others: the CPU waits."""
        if not streams:
            return
        context = PrimaryContext(self._driver)
        try:
            with context.current():
                for stream in streams:
                    self._driver.call("cuStreamSynchronize", stream)
        finally:
            context.release()


def _dtype(onnx_type: str) -> np.dtype[Any]:
    """`tensor(float)` -> `float32`; `tensor(int64)` -> `int64`."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
