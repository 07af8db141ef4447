"""Which shapes get a CUDA graph, and captures on a driver that really records and replays. The GPU: pytest -m gpu."""

from collections.abc import Callable

from tnm_pipeline.engines.graphs import GraphCache

Run = Callable[..., str]


class Graph:
    """Knows whether it was destroyed."""

    def __init__(self) -> None:
        self.destroyed = 0

    def destroy(self) -> None:
        self.destroyed += 1


def test_a_key_is_worth_a_graph_when_it_comes_back() -> None:
    cache: GraphCache[str, Graph] = GraphCache(2)
    assert [cache.worth(key) for key in "abab"] == [False, False, True, True]


def test_more_keys_in_turn_than_there_is_room_for_are_never_worth_one() -> None:
    cache: GraphCache[str, Graph] = GraphCache(2)
    assert not any(cache.worth(key) for key in "abcabcabc")


def test_no_key_is_worth_one_where_none_are_kept() -> None:
    cache: GraphCache[str, Graph] = GraphCache(0)
    assert not any(cache.worth(key) for key in "aaaa")


def test_the_graph_that_was_not_used_for_longest_makes_room() -> None:
    cache: GraphCache[str, Graph] = GraphCache(2)
    a, b, c = Graph(), Graph(), Graph()
    cache.keep("a", a)
    cache.keep("b", b)
    assert cache.get("a") is a
    cache.keep("c", c)
    assert (a.destroyed, b.destroyed, c.destroyed) == (0, 1, 0)
    assert cache.get("b") is None
    assert len(cache) == 2


def test_clear_destroys_each_once_and_keys_start_again() -> None:
    cache: GraphCache[str, Graph] = GraphCache(2)
    graph = Graph()
    cache.keep("a", graph)
    cache.clear()
    cache.clear()
    assert graph.destroyed == 1
    assert [cache.worth("a") for _ in range(2)] == [False, True]


def test_a_refused_key_is_never_tried_again_and_says_why() -> None:
    cache: GraphCache[str, Graph] = GraphCache(2)
    cache.worth("a")
    assert cache.worth("a")
    cache.refuse("a", "it allocates")
    cache.clear()
    assert not any(cache.worth("a") for _ in range(4))
    assert cache.refusals == ("it allocates",)


def test_reasons_do_not_pile_up() -> None:
    cache: GraphCache[int, Graph] = GraphCache(2)
    for key in range(1000):
        cache.refuse(key, str(key))
    assert len(cache.refusals) == 256
    assert cache.refusals[-1] == "999"


CAPTURE = """
import ctypes
import numpy as np
driver_side = ctypes.CDLL("libcuda.so.1")
held = driver_side.host_driver_held
from tnm_pipeline.engines.cuda import CudaDriver
from tnm_pipeline.engines.device import Device
from tnm_pipeline.engines.graphs import CaptureRefused, capture
driver = CudaDriver()
device = Device(driver)
"""


def test_a_graph_copies_what_is_there_when_it_is_launched(run_on_host_driver: Run) -> None:
    code = f"""{CAPTURE}
with device.current():
    there, back = device.staging("there", 32).view(np.float32), device.staging("back", 32).view(np.float32)
    address = device.reserve("x", 32)
    def queue():
        device.upload(address, there)
        device.download(back, address)
    before = held()
    graph = capture(driver, device.stream, queue)
    print(held() - before, "held: the executable graph, and not the one that it was made of")
    back[:] = 0
    device.synchronize()
    print(back.any(), "a capture runs nothing")
    for number in (1, 2):
        there[:] = number
        graph.launch(device.stream)
        device.synchronize()
        print(back[0])
    graph.destroy()
device.close()
print(held())
"""
    assert run_on_host_driver(code).splitlines() == [
        "1 held: the executable graph, and not the one that it was made of",
        "False a capture runs nothing",
        *("1.0", "2.0", "0"),
    ]


def test_an_array_that_is_collected_meanwhile_does_not_spoil_a_capture(run_on_host_driver: Run) -> None:
    code = f"""{CAPTURE}
from tnm_pipeline.engines.arrays import DeviceArray
garbage = [DeviceArray.empty(driver, (4,), np.dtype("float32"))]
with device.current():
    there, address = device.staging("there", 32), device.reserve("x", 32)
    def queue():
        device.upload(address, there)
        garbage.clear()
        device.upload(address, there)
    capture(driver, device.stream, queue).destroy()
device.close()
print(held())
"""
    assert run_on_host_driver(code).split() == ["0"]


def test_what_cannot_be_captured_is_refused_and_the_stream_goes_on(run_on_host_driver: Run) -> None:
    code = f"""{CAPTURE}
def wait():
    device.synchronize()
def allocate():
    device.reserve("y", 1 << 20)
def pageable():
    device.upload(address, np.ones(8, np.float32))
def interrupt():
    raise KeyboardInterrupt
with device.current():
    address = device.reserve("x", 32)
    before = held()
    for work in (wait, allocate, pageable, interrupt):
        try:
            capture(driver, device.stream, work)
        except (CaptureRefused, KeyboardInterrupt) as error:
            print(type(error).__name__, error)
        device.synchronize()
        assert held() == before
device.close()
print(held())
"""
    unsupported = "CaptureRefused {} failed with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)"
    assert run_on_host_driver(code).splitlines() == [
        unsupported.format("cuStreamSynchronize"),
        unsupported.format("cuMemAlloc_v2"),
        unsupported.format("cuMemcpyHtoDAsync_v2"),
        "KeyboardInterrupt ",
        "0",
    ]
