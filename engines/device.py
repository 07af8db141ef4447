"""Memory of GPU 0, and a stream with buffers of its own: what one execution context works with."""

import ctypes
import weakref
from contextlib import AbstractContextManager
from ctypes import byref, c_int, c_uint64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.engines.cuda import CudaDriver, PrimaryContext

# cuda.h
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_POINTER_DEVICE_ORDINAL = 9
_CAPTURE_RELAXED = 2


class DeviceMemory:
    """Memory of GPU 0 that is freed with this object, whichever session is closed before that.

    Freeing waits for the GPU, so that work which still reads the memory ends first.

    Args:
        driver: The driver.
        size: Bytes.

    Raises:
        DeviceOutOfMemory: The GPU has too little free memory.
    """

    def __init__(self, driver: CudaDriver, size: int) -> None:
        context = PrimaryContext(driver)
        address = c_uint64()
        try:
            with context.current():
                driver.call("cuMemAlloc_v2", byref(address), max(size, 1))  # CUDA refuses to allocate nothing
        except BaseException:
            context.release()
            raise
        self.address = address.value
        weakref.finalize(self, _free, driver, context, address.value)


def _free(driver: CudaDriver, context: PrimaryContext, address: int) -> None:
    mode = c_int(_CAPTURE_RELAXED)
    with context.current():
        # A garbage collection may come here while its thread captures a graph, which freeing would spoil otherwise.
        driver.call("cuThreadExchangeStreamCaptureMode", byref(mode))
        driver.call("cuMemFree_v2", address)
        driver.call("cuThreadExchangeStreamCaptureMode", byref(mode))
    context.release()


class Device:
    """GPU 0's primary context, one stream, and buffers by name that grow and are reused. One thread at a time.

    Every method but `current` and `close` must run inside `with device.current():`.

    Attributes:
        growths: How often a buffer moved because it grew: then addresses of before are no longer valid.

    Raises:
        CudaError: The context or the stream cannot be created.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self.growths = 0
        self._driver = driver
        self._stream = c_void_p()
        self._event = c_void_p()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, capacity in bytes)
        self._staging: dict[str, NDArray[np.uint8]] = {}  # name -> page-locked host memory
        self._context = PrimaryContext(driver)
        try:
            with self.current():
                driver.call("cuStreamCreate", byref(self._stream), _STREAM_NON_BLOCKING)
        except BaseException:
            self._context.release()
            raise

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        assert self._stream.value is not None, "the stream is created before anybody can ask for it"
        return self._stream.value

    def current(self) -> AbstractContextManager[None]:
        """Make this context current for the calling thread, and restore the caller's own one afterwards."""
        return self._context.current()

    def reserve(self, name: str, size: int) -> int:
        """The address of the device buffer `name`, of at least `size` bytes; growing it loses its content."""
        size = max(size, 1)  # CUDA refuses to allocate nothing, TensorRT refuses a null address
        address, capacity = self._buffers.get(name, (0, 0))
        if size <= capacity:
            return address
        if capacity:
            del self._buffers[name]
            self.growths += 1
            self._driver.call("cuMemFree_v2", address)
        grown = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(grown), size)
        self._buffers[name] = (grown.value, size)
        return grown.value

    def staging(self, name: str, size: int) -> NDArray[np.uint8]:
        """`size` bytes of the page-locked host buffer `name`; growing it loses its content.

        Copies from and to such memory run beside the CPU, and only those can be part of a CUDA graph.
        """
        held = self._staging.get(name)
        if held is None or held.size < size:
            if held is not None:
                del self._staging[name]
                self.growths += 1
                self._driver.call("cuMemFreeHost", held.ctypes.data)
            pinned = c_void_p()
            self._driver.call("cuMemAllocHost_v2", byref(pinned), max(size, 1))
            assert pinned.value is not None, "a successful allocation has an address"
            held = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(pinned.value))
            self._staging[name] = held
        return held[:size]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy of a C-contiguous array to `address`; keep the array alive until `synchronize`."""
        if array.nbytes:
            self._driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from `address` into a C-contiguous array, filled once `synchronize` returns."""
        if array.nbytes:
            self._driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes between two addresses of the GPU."""
        if size:
            self._driver.call("cuMemcpyDtoDAsync_v2", to, source, size, self._stream)

    def holds(self, address: int) -> bool:
        """Whether `address` is memory of this GPU.

        Raises:
            CudaError: CUDA does not know the address at all.
        """
        ordinal = c_int(-1)
        self._driver.call("cuPointerGetAttribute", byref(ordinal), _POINTER_DEVICE_ORDINAL, address)
        return ordinal.value == 0

    def wait_for(self, stream: int) -> None:
        """Let what is queued from now on wait for what is queued on another stream by now; the CPU does not wait."""
        if not self._event:
            self._driver.call("cuEventCreate", byref(self._event), _EVENT_DISABLE_TIMING)
        self._driver.call("cuEventRecord", self._event, stream)
        self._driver.call("cuStreamWaitEvent", self._stream, self._event, 0)

    def synchronize(self) -> None:
        """Wait for everything queued; a failure inside a kernel surfaces here."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the buffers and the stream and release the context."""
        with self.current():
            for address, _ in self._buffers.values():
                self._driver.call("cuMemFree_v2", address)
            self._buffers.clear()
            for pinned in self._staging.values():
                self._driver.call("cuMemFreeHost", pinned.ctypes.data)
            self._staging.clear()
            if self._event:
                self._driver.call("cuEventDestroy_v2", self._event)
            self._driver.call("cuStreamDestroy_v2", self._stream)
        self._context.release()
