"""The part of the CUDA driver API that inference needs, through ctypes: no torch, no cupy, no CUDA toolkit."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

from tnm_pipeline.engines.errors import DeviceOutOfMemory, EnvironmentLacks

# Argument types from cuda.h. Without them ctypes would pass a 64-bit address as a 32-bit int. Names are those of the
# library, where a plain name is often an older function: cuda.h defines cuMemAlloc as cuMemAlloc_v2, and
# cuGraphInstantiate as cuGraphInstantiateWithFlags.
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
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
_SUCCESS, _OUT_OF_MEMORY = 0, 2


class CudaError(EnvironmentLacks):
    """A CUDA driver call failed; the message has the call and CUDA's name for the failure."""


class CudaDriver:
    """The driver library, loaded and initialised; every call is checked. Any number of threads.

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
            short = "page-locked host memory" if name == "cuMemAllocHost_v2" else "memory"
            raise DeviceOutOfMemory(f"{name}: the GPU is out of {short}; use a smaller batch or free the GPU")
        error_name = c_char_p()
        self._library.cuGetErrorName(code, byref(error_name))  # leaves a null where it does not know the code
        raise CudaError(f"{name} failed with {(error_name.value or b'an unknown error').decode()} ({code})")


class PrimaryContext:
    """GPU 0's primary context, where TensorRT's own CUDA runtime, torch and cupy live too. Any number of threads.

    Each object holds it once, until `release`.

    Raises:
        CudaError: The context cannot be created.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._ordinal = c_int()
        self._handle = c_void_p()
        driver.call("cuDeviceGet", byref(self._ordinal), 0)
        driver.call("cuDevicePrimaryCtxRetain", byref(self._handle), self._ordinal)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this context current for the calling thread, and restore the caller's own one afterwards."""
        self._driver.call("cuCtxPushCurrent_v2", self._handle)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def release(self) -> None:
        """Give it back; nothing may be done with this object afterwards."""
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)
