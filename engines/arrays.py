"""Arrays that callers may give and get: numpy's, those of anything that speaks DLPack, and CUDA's without a copy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.engines.cuda import CudaDriver, PrimaryContext
from tnm_pipeline.engines.device import DeviceMemory
from tnm_pipeline.engines.dlpack import cuda_capsule
from tnm_pipeline.engines.errors import FeedError
from tnm_pipeline.engines.tensors import TensorSpec

Array: TypeAlias = NDArray[Any]

_LEGACY_DEFAULT_STREAM = 1  # CU_STREAM_LEGACY of cuda.h, and what DLPack and the CUDA array interface call 1
_DLPACK_CUDA = 2  # kDLCUDA


@dataclass(frozen=True)
class CudaArray:
    """Memory of a GPU that somebody else owns, C-contiguous.

    Attributes:
        address: Of the first element; 0 where there are none.
        shape: Sizes.
        dtype: Of the elements.
        stream: The stream whose queued work fills the memory, None where it is filled.
        owner: What keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: object

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return _bytes(self.shape, self.dtype)


Feed: TypeAlias = Array | CudaArray
"""What a backend takes for one input."""


class DeviceArray:
    """An output on the GPU, complete and C-contiguous; its memory is freed with it.

    torch, cupy and numba take it without a copy (`torch.as_tensor(array, device="cuda")`), and a session takes it as
    an input. Keep it until the work that reads it is done.

    Args:
        address: Of the first element.
        shape: Sizes.
        dtype: Of the elements.
        owner: What frees the memory once nothing refers to it.
        driver: The driver.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object, driver: CudaDriver
    ) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self._owner = owner
        self._driver = driver

    @classmethod
    def empty(cls, driver: CudaDriver, shape: tuple[int, ...], dtype: np.dtype[Any]) -> "DeviceArray":
        """New memory with any content.

        Raises:
            DeviceOutOfMemory: The GPU has too little free memory.
        """
        memory = DeviceMemory(driver, _bytes(shape, dtype))
        return cls(memory.address, shape, dtype, memory, driver)

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype}, cuda:0)"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return _bytes(self.shape, self.dtype)

    def numpy(self) -> Array:
        """A copy in the host's memory."""
        array = np.empty(self.shape, self.dtype)
        if array.nbytes:
            context = PrimaryContext(self._driver)
            try:
                with context.current():
                    self._driver.call("cuMemcpyDtoH_v2", array.ctypes.data, self.address, array.nbytes)
            finally:
                context.release()
        return array

    @property
    def __cuda_array_interface__(self) -> Mapping[str, object]:
        """Version 3: https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": None,
        }

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule that shares the memory. The content is complete, so no `stream` has to wait.

        Raises:
            BufferError: A copy or another device is asked for.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("memory of the GPU is shared as it is: call numpy() for a copy on the CPU")
        return cuda_capsule(self.address if self.nbytes else 0, self.shape, self.dtype, owner=self)

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kDLCUDA, 0)."""
        return _DLPACK_CUDA, 0


def as_feed(spec: TensorSpec, value: Any) -> Feed:
    """Turn what a caller passes for an input into what backends take, without a copy.

    Call it on the caller's thread: an array that does not name its stream is ordered after that thread's work.

    Args:
        spec: The input. Only its name and dtype are used, for messages: size and dtype are checked elsewhere.
        value: A numpy array; an object with `__cuda_array_interface__` (torch on CUDA, cupy, numba, `DeviceArray`);
            or one of the CPU with `__dlpack__` (torch, jax).

    Returns:
        The numpy array itself, a numpy view of the same memory, or a `CudaArray`.

    Raises:
        FeedError: It is none of these, not contiguous on the GPU, or of a dtype that numpy lacks.
    """
    if isinstance(value, np.ndarray):
        return value
    try:
        # A property that raises where a tensor is not on a GPU, or requires a gradient.
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is not None:
            return _cuda_array(spec, value, interface)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
    except FeedError:
        raise
    except (BufferError, RuntimeError, TypeError) as error:
        raise FeedError(f"input {spec.name} cannot be read where it is: {error}") from error
    raise FeedError(f"input {spec.name} is a {type(value).__name__}: pass numpy.asarray({spec.name}, {spec.dtype!r})")


def _cuda_array(spec: TensorSpec, value: Any, interface: Mapping[str, Any]) -> CudaArray:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != _contiguous_strides(shape, dtype):
        raise FeedError(
            f"input {spec.name} is not contiguous (shape {shape}, strides {tuple(strides)} bytes): pass "
            f"{spec.name}.contiguous(), or cupy.ascontiguousarray({spec.name})"
        )
    if interface.get("mask") is not None:
        raise FeedError(f"input {spec.name} has a mask, and no backend takes one: fill it in")
    stream = interface.get("stream")
    if interface.get("version", 0) < 3:  # which does not know streams: torch's tensors
        if hasattr(value, "__dlpack__"):
            value.__dlpack__(stream=_LEGACY_DEFAULT_STREAM)  # lets that stream wait for the caller's; frees itself
        stream = _LEGACY_DEFAULT_STREAM
    return CudaArray(interface["data"][0], shape, dtype, stream, value)


def _contiguous_strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize
