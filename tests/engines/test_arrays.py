"""What callers may pass and get. On the stand-in driver, whose device memory is host memory; a GPU: pytest -m gpu."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from tnm_pipeline.engines import FeedError, TensorSpec
from tnm_pipeline.engines.arrays import CudaArray, as_feed
from tnm_pipeline.engines.dlpack import cuda_capsule

Run = Callable[..., str]
SPEC = TensorSpec("x", "float32", ("batch", 2))


class OnGpu:
    """An array of an invented CUDA library."""

    def __init__(self, **changes: Any) -> None:
        good = {"version": 3, "shape": (3, 2), "typestr": "<f4", "data": (1 << 40, False), "stream": 77}
        self.__cuda_array_interface__ = {**good, **changes}


def test_numpy_passes_as_it_is() -> None:
    array = np.zeros((3, 2), np.float32)
    assert as_feed(SPEC, array) is array


def test_a_tensor_of_the_cpu_is_seen_without_a_copy() -> None:
    tensor = torch.zeros(3, 2)
    seen = as_feed(SPEC, tensor)
    tensor[0, 0] = 5
    assert isinstance(seen, np.ndarray)
    assert seen[0, 0] == 5


def test_a_cuda_array_is_described_and_kept_alive() -> None:
    given = OnGpu()
    seen = as_feed(SPEC, given)
    assert isinstance(seen, CudaArray)
    assert (seen.address, seen.shape, seen.dtype, seen.stream) == (1 << 40, (3, 2), np.dtype("float32"), 77)
    assert (seen.ndim, seen.nbytes) == (2, 24)
    assert seen.owner is given


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({"stream": None}, None),  # the producer says that there is nothing to wait for
        ({"stream": 1}, 1),
        ({"version": 2}, 1),  # which knows no streams: wait for the default one
    ],
)
def test_the_stream_to_wait_for(changes: dict[str, Any], stream: int | None) -> None:
    seen = as_feed(SPEC, OnGpu(**changes))
    assert isinstance(seen, CudaArray)
    assert seen.stream == stream


def test_a_producer_without_streams_in_its_interface_orders_its_work_by_dlpack() -> None:
    class Tensor(OnGpu):
        asked: int | None = None

        def __dlpack__(self, *, stream: int) -> object:
            self.asked = stream
            return object()

    tensor = Tensor(version=2)
    as_feed(SPEC, tensor)
    assert tensor.asked == 1


@pytest.mark.parametrize("strides", [None, (8, 4)])
def test_contiguous_strides_may_be_spelled_out(strides: tuple[int, ...] | None) -> None:
    assert isinstance(as_feed(SPEC, OnGpu(strides=strides)), CudaArray)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (OnGpu(strides=(4, 12)), r"x is not contiguous .*pass x\.contiguous\(\)"),
        (OnGpu(mask=OnGpu()), "x has a mask"),
        ([[0.0, 0.0]], r"x is a list: pass numpy\.asarray\(x, 'float32'\)"),
        (np.float32(1), r"x is a float32: pass numpy\.asarray\(x, 'float32'\)"),
        (torch.zeros(3, 2, requires_grad=True), "x cannot be read where it is: .*gradient"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "x cannot be read where it is"),
    ],
)
def test_what_no_backend_takes_is_refused(value: object, complaint: str) -> None:
    with pytest.raises(FeedError, match=complaint):
        as_feed(SPEC, value)


class Shared:
    """Lends a numpy array by our capsule, as memory of the CPU."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        return cuda_capsule(self.array.ctypes.data, self.array.shape, self.array.dtype, owner=self, device_type=1)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_a_capsule_is_read_alike_by_numpy_and_torch(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    np.testing.assert_array_equal(np.from_dlpack(Shared(array)), array, strict=True)
    np.testing.assert_array_equal(from_dlpack(Shared(array)).numpy(), array, strict=True)


def test_a_capsule_keeps_its_owner_as_long_as_somebody_reads_it() -> None:
    owner = Shared(np.ones(3))
    gone = weakref.ref(owner)
    reader = from_dlpack(owner)
    del owner
    gc.collect()
    assert gone() is not None
    del reader
    gc.collect()
    assert gone() is None


def test_a_capsule_that_nobody_took_frees_its_owner() -> None:
    owner = Shared(np.ones(3))
    gone = weakref.ref(owner)
    capsule = owner.__dlpack__()
    del owner, capsule
    gc.collect()
    assert gone() is None


def test_dlpack_has_no_dates() -> None:
    with pytest.raises(BufferError, match="no dtype datetime64"):
        cuda_capsule(0, (), np.dtype("datetime64[s]"), owner=None)


def test_an_output_on_the_device_frees_its_memory_with_the_last_reader(run_on_host_driver: Run) -> None:
    code = """
import ctypes, gc
import numpy as np
held = ctypes.CDLL("libcuda.so.1").host_driver_held
from tnm_pipeline.engines import TensorSpec
from tnm_pipeline.engines.arrays import DeviceArray, as_feed
from tnm_pipeline.engines.cuda import CudaDriver
array = DeviceArray.empty(CudaDriver(), (2, 3), np.dtype("float32"))
ctypes.memset(array.address, 0, array.nbytes)
print(array, array.numpy().tolist(), array.__dlpack_device__(), held())
feed = as_feed(TensorSpec("x", "float32", (2, 3)), array)
print(feed.address == array.address, feed.stream)
for wish in ({"copy": True}, {"dl_device": (1, 0)}):
    try:
        array.__dlpack__(**wish)
    except BufferError as error:
        print(error)
capsule = array.__dlpack__(stream=2, max_version=(1, 0), dl_device=(2, 0), copy=False)
del array, feed
print(held())
del capsule
print(held())
nothing = DeviceArray.empty(CudaDriver(), (0, 3), np.dtype("float32"))
print(nothing.numpy().shape, nothing.__cuda_array_interface__["data"])
"""
    assert run_on_host_driver(code).splitlines() == [
        "DeviceArray((2, 3), float32, cuda:0) [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]] (2, 0) 2",
        "True None",
        *["memory of the GPU is shared as it is: call numpy() for a copy on the CPU"] * 2,
        *("2", "0"),
        "(0, 3) (0, False)",
    ]
