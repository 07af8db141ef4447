"""The queue by itself: what is gathered, in which order, and that nothing waits in vain."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any

import pytest

from tnm_pipeline.engines import Overloaded, SessionClosed
from tnm_pipeline.engines.dispatch import Dispatcher, Request

Answers = list[list[Request]]


def request(rows: int = 1, size: int = 1, key: object = None) -> Request:
    return Request({}, Future(), None, time.monotonic(), copy_context(), key, rows, size, on_device=False)


def dispatcher(answer: Callable[[list[Request]], None], **changes: Any) -> Dispatcher:
    bounds = {"workers": 1, "bound": 100, "max_rows": 8, "max_delay": 30.0, "max_padding": 0.25, "name": "test"}
    return Dispatcher(answer, **{**bounds, **changes})


def test_requests_of_similar_sizes_go_together() -> None:
    """A queue that fills while the worker is held: sizes 4 to 40, at most a quarter of padding."""
    held, answers = threading.Event(), Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        held.wait()

    queue = dispatcher(answer, max_delay=0.0)
    queue.put(request(size=1000))
    while queue.waiting:
        time.sleep(0.001)
    sizes = [20, 4, 40, 18, 24, 5, 36, 21]
    for size in sizes:
        queue.put(request(size=size))
    held.set()
    assert queue.close(None) == []
    found = [[one.size for one in requests] for requests in answers]
    assert found == [[1000], [20, 21, 18, 24], [4, 5], [40, 36]]
    for batch in found:
        assert sum(batch) >= 0.75 * len(batch) * max(batch)


def test_other_keys_wait_for_their_own_batch() -> None:
    answers = Answers()
    queue = dispatcher(answers.append, max_rows=3)
    for key in "abababb":
        queue.put(request(key=key))
    assert queue.close(None) == []
    assert sorted("".join(str(one.key) for one in requests) for requests in answers) == ["aaa", "b", "bbb"]


def test_what_two_workers_gather_is_not_halved() -> None:
    answers = Answers()
    queue = dispatcher(answers.append, workers=4)
    for _ in range(16):
        queue.put(request())
    assert queue.close(None) == []
    assert [len(requests) for requests in answers] == [8, 8]


def test_the_delay_counts_from_the_arrival() -> None:
    """What waited for the worker longer than its delay is not kept waiting again."""
    held, answers = threading.Event(), Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        held.wait()

    queue = dispatcher(answer, max_delay=0.05)
    queue.put(request())
    while not answers:
        time.sleep(0.001)
    queue.put(late := request())
    time.sleep(0.06)
    begun = time.monotonic()
    held.set()
    while len(answers) < 2:
        time.sleep(0.0001)
    assert time.monotonic() - begun < 0.05
    assert answers[1] == [late]
    queue.close(None)


def test_a_bound_and_an_end() -> None:
    held = threading.Event()

    def hold(_: list[Request]) -> None:
        held.wait()

    queue = dispatcher(hold, max_rows=1, bound=2)
    queue.put(request())
    while queue.waiting:
        time.sleep(0.001)
    left = [request(), request()]
    for one in left:
        queue.put(one)
    with pytest.raises(Overloaded):
        queue.put(request())
    assert queue.close(0.01) == left
    with pytest.raises(SessionClosed):
        queue.put(request())
    held.set()
    assert queue.close(10) == []


def test_a_queue_that_nobody_used_starts_no_thread() -> None:
    before = threading.active_count()
    queue = dispatcher(lambda _: None)
    assert threading.active_count() == before
    assert queue.close(None) == []
