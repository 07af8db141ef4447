"""Arrays that are on the GPU before a call, or stay there after it, against the stand-ins; real ones: pytest -m gpu."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.backends.on_stand_ins import START

Run = Callable[..., str]

ARRAYS = (
    START
    + """
from ctypes import c_size_t, c_uint64, c_void_p
from tnm_pipeline.engines.arrays import as_feed
driver_side.host_driver_double.argtypes = (c_uint64, c_uint64, c_size_t, c_void_p)
driver_side.cuStreamCreate.argtypes = (c_void_p, ctypes.c_uint)

class OnGpu:
    def __init__(self, rows, number, stream=None, offset=0):
        self.room = np.full(rows * 8 + 128, np.nan, np.float32)
        start = -self.room.ctypes.data % 256 // 4 + offset
        self.memory = self.room[start : start + rows * 8]
        self.memory[:] = number
        self.__cuda_array_interface__ = {
            "version": 3, "shape": (rows, 8), "typestr": "<f4", "data": (self.memory.ctypes.data, False),
            "stream": stream,
        }

def ask_gpu(network, array, expected, on_device=False):
    spec = network._manifest.inputs[0]
    answer = network.run({"input": as_feed(spec, array)}, on_device=on_device)["output"]
    array = answer.numpy() if on_device else answer
    assert (array == expected).all(), array
    return answer
"""
)


@pytest.fixture
def run(run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str) -> Run:
    """Run code after `ARRAYS` with the artifact of the stand-in as its argument."""

    def start(code: str, **environment: str) -> str:
        return run_on_host_driver(ARRAYS + code, doubler(), PYTHONPATH=stand_in, **environment)

    return start


def test_an_array_of_the_gpu_is_read_where_it_is(run: Run) -> None:
    """No buffer for the input exists. An address that TensorRT would refuse is copied, on the GPU, to one."""
    said = run("""
network = backend(contexts=1, graphs=0)
device = network._contexts[0]._device
ask_gpu(network, OnGpu(3, 4.0), 8.0)
print(sorted(device._buffers), sorted(device._staging))
ask_gpu(network, OnGpu(3, 5.0, offset=1), 10.0)
print(sorted(device._buffers), sorted(device._staging))
network.close()
print(held())
""")
    assert said.splitlines() == ["['', 'output'] ['output']", "['', 'input', 'output'] ['output']", "0"]


def test_work_that_fills_an_array_is_waited_for(run: Run) -> None:
    """On a stream of the caller's, and on the default one: the stand-in runs it only when somebody waits."""
    said = run("""
stream = c_void_p()
network = backend(contexts=1)
with network._primary.current():
    driver_side.cuStreamCreate(ctypes.byref(stream), 1)
for handle in (stream.value, 1):
    source, array = OnGpu(2, 7.0), OnGpu(2, 0.0, stream=handle)
    with network._primary.current():
        driver_side.host_driver_double(array.memory.ctypes.data, source.memory.ctypes.data, 16, handle)
    assert not array.memory.any(), "it is still queued"
    ask_gpu(network, array, 28.0)
    print("waited")
""")
    assert said.splitlines() == ["waited", "waited"]


def test_outputs_stay_on_the_device_and_outlive_the_session(run: Run) -> None:
    said = run("""
network = backend(contexts=1, graphs=2)
kept = [ask_gpu(network, OnGpu(2, float(number)), 2.0 * number, on_device=True) for number in range(5)]
twice = ask_gpu(network, kept[4], 16.0, on_device=True)
network.close()
print([float(answer.numpy()[0, 0]) for answer in kept], float(twice.numpy()[0, 0]), held() > 0)
del kept, twice
print(held())
""")
    assert said.splitlines() == ["[0.0, 2.0, 4.0, 6.0, 8.0] 16.0 True", "0"]


def test_a_graph_belongs_to_the_address_that_it_read(run: Run) -> None:
    said = run("""
network = backend(contexts=1, graphs=4)
first, second = OnGpu(2, 1.0), OnGpu(2, 2.0)
for _ in range(3):
    ask_gpu(network, first, 2.0)
print(graphs(), launches())
ask_gpu(network, second, 4.0)
ask(network, 2, 3.0)
print(graphs(), launches())
first.memory[:] = 9.0
ask_gpu(network, first, 18.0)
ask_gpu(network, first, 18.0, on_device=True)
print(graphs(), launches())
network.close()
print(held())
""")
    assert said.splitlines() == ["1 1", "1 1", "1 2", "0"]


def test_no_rows_need_no_address(run: Run) -> None:
    said = run("""
network = backend(contexts=1)
empty = OnGpu(0, 0.0)
empty.__cuda_array_interface__["data"] = (0, False)
print(ask_gpu(network, empty, 0.0).shape, ask_gpu(network, empty, 0.0, on_device=True).shape)
""")
    assert said.splitlines() == ["(0, 8) (0, 8)"]


def test_addresses_of_elsewhere_are_refused_and_the_next_call_answers(run: Run) -> None:
    said = run("""
import os
network = backend(contexts=1)
array = OnGpu(2, 1.0)
os.environ["HOST_DRIVER_OTHER_GPU"] = str(array.memory.ctypes.data)
nowhere = OnGpu(2, 1.0)
nowhere.__cuda_array_interface__["data"] = (256, False)
for given in (array, nowhere):
    try:
        ask_gpu(network, given, 2.0)
    except FeedError as error:
        print(error)
ask(network, 2)
network.close()
print(held())
""")
    assert said.splitlines() == [
        "input input is on another GPU than the session, which runs on GPU 0: copy it there",
        "input input is said to be on a GPU, where CUDA knows no such address: cuPointerGetAttribute failed with "
        "CUDA_ERROR_INVALID_VALUE (1)",
        "0",
    ]
