"""The part of the CUDA driver API that inference needs, through ctypes: no torch, no cupy, no CUDA toolkit.

TensorRT's own CUDA runtime works in whichever context is current, so both share the primary context of GPU 0.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from numpy.typing import NDArray

from tnm_pipeline.engines.errors import DeviceOutOfMemory, EnvironmentLacks

# Argument types from cuda.h. Without them ctypes would pass a 64-bit address as a 32-bit int.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
_STREAM_NON_BLOCKING = 1
_SUCCESS, _OUT_OF_MEMORY = 0, 2


class CudaError(EnvironmentLacks):
    """A CUDA driver call failed; the message has the call and CUDA's name for the failure."""


class CudaDriver:
    """The driver library, loaded and initialised; every call is checked.

    Raises:
        OSError: The library is not installed.
        CudaError: It is installed and does not start (no GPU is visible, say).
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        for name, signature in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = signature, c_int
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call the driver function `name`.

        Args:
            name: A function of `_SIGNATURES`.
            arguments: Its arguments, outputs as `byref(...)`.

        Raises:
            DeviceOutOfMemory: It returned CUDA_ERROR_OUT_OF_MEMORY.
            CudaError: It returned anything else but CUDA_SUCCESS.
        """
        code: int = getattr(self._library, name)(*arguments)
        if code == _SUCCESS:
            return
        if code == _OUT_OF_MEMORY:
            raise DeviceOutOfMemory(f"{name}: the GPU is out of memory; use a smaller batch or free the GPU")
        error_name = c_char_p()
        self._library.cuGetErrorName(code, byref(error_name))  # leaves a null where it does not know the code
        raise CudaError(f"{name} failed with {(error_name.value or b'an unknown error').decode()} ({code})")


class Device:
    """GPU 0's primary context, one stream, and named buffers that grow and are reused. One thread at a time.

    Every method but `current` and `close` must run inside `with device.current():`.

    Raises:
        CudaError: The context or the stream cannot be created.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._ordinal = c_int()
        self._context = c_void_p()
        self._stream = c_void_p()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, capacity in bytes)
        driver.call("cuDeviceGet", byref(self._ordinal), 0)
        driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._ordinal)
        try:
            with self.current():
                driver.call("cuStreamCreate", byref(self._stream), _STREAM_NON_BLOCKING)
        except CudaError:
            driver.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)
            raise

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        assert self._stream.value is not None, "the stream is created before anybody can ask for it"
        return self._stream.value

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this context current for the calling thread, and restore the caller's own one afterwards."""
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def reserve(self, name: str, size: int) -> int:
        """The address of the buffer `name`, of at least `size` bytes; growing it loses its content."""
        size = max(size, 1)  # CUDA refuses to allocate nothing, TensorRT refuses a null address
        address, capacity = self._buffers.get(name, (0, 0))
        if size <= capacity:
            return address
        if capacity:
            del self._buffers[name]
            self._driver.call("cuMemFree_v2", address)
        grown = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(grown), size)
        self._buffers[name] = (grown.value, size)
        return grown.value

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy of a C-contiguous array to `address`; keep the array alive until `synchronize`."""
        if array.nbytes:
            self._driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from `address` into a C-contiguous array, filled once `synchronize` returns."""
        if array.nbytes:
            self._driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for everything queued; a failure inside a kernel surfaces here."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the buffers and the stream and release the context."""
        with self.current():
            for address, _ in self._buffers.values():
                self._driver.call("cuMemFree_v2", address)
            self._buffers.clear()
            self._driver.call("cuStreamDestroy_v2", self._stream)
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)
