"""The queue by itself: what is gathered, in which order, and that nothing waits in vain."""

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any

import pytest

from tnm_pipeline.engines import Overloaded, SessionClosed
from tnm_pipeline.engines.batching import Extent, Join
from tnm_pipeline.engines.dispatch import Dispatcher, Request

Answers = list[list[Request]]
MANIFEST: Any = None  # nobody here looks at it


def request(rows: int = 1, size: int = 1, key: object = None, seconds: float | None = None) -> Request:
    extent, now = Extent(rows, ((size,),), rows * size), time.monotonic()
    deadline = None if seconds is None else now + seconds
    return Request({}, Future(), deadline, now, copy_context(), key, extent, False, MANIFEST)


def size(one: Request) -> int:
    return one.extent.shapes[0][0]


JOIN = Join(8, 30.0, 0.25)


def dispatcher(
    answer: Callable[[list[Request]], None], workers: int = 1, bound: int = 100, join: Join | None = JOIN
) -> Dispatcher:
    return Dispatcher(answer, workers=workers, bound=bound, join=join, name="test")


def test_requests_of_similar_sizes_go_together() -> None:
    """A queue that fills while the worker is held: sizes 4 to 40, at most a quarter of padding."""
    held, answers = threading.Event(), Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        held.wait()

    queue = dispatcher(answer, join=Join(8, 0.0, 0.25))
    queue.put(request(size=1000))
    while queue.waiting:
        time.sleep(0.001)
    sizes = [20, 4, 40, 18, 24, 5, 36, 21]
    for number in sizes:
        queue.put(request(size=number))
    held.set()
    assert queue.close(None) == []
    found = [[size(one) for one in requests] for requests in answers]
    assert found == [[1000], [20, 21, 18, 24], [4, 5], [40, 36]]
    for batch in found:
        assert sum(batch) >= 0.75 * len(batch) * max(batch)


def test_other_keys_wait_for_their_own_batch() -> None:
    answers = Answers()
    queue = dispatcher(answers.append, join=Join(3, 30.0, 0.25))
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


def test_a_request_waits_for_others_no_longer_than_it_may() -> None:
    """The delay counts from when a worker turns to it, and half of the time until a deadline is left for the run."""
    free, hasty = request(), request(seconds=0.2)
    later = hasty.queued + 0.07
    assert free.patient_until(later, 0.5) == later + 0.5
    assert hasty.patient_until(later, 0.5) == pytest.approx(hasty.queued + 0.1)
    assert hasty.patient_until(later, 0.02) == later + 0.02
    assert not hasty.late(later)
    assert hasty.late(hasty.queued + 0.3)
    assert not free.late(later + 1e9)


def test_who_was_just_answered_is_joined_by_who_waited_meanwhile() -> None:
    """Four callers in turns with a run that takes longer than the delay: batches of four, not of two and two."""
    answers = Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        time.sleep(0.4)
        for one in requests:
            one.future.set_result({})

    queue = dispatcher(answer, join=Join(4, 0.3, 0.25))

    def call() -> None:
        for _ in range(3):
            mine = request()
            queue.put(mine)
            mine.future.result()

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    queue.close(None)
    assert sum(map(len, answers)) == 12
    assert [len(requests) for requests in answers].count(4) >= 2


def test_a_deadline_in_the_batch_ends_the_waiting() -> None:
    answers = Answers()
    queue = dispatcher(answers.append)  # others are waited for for 30 s
    queue.put(first := request())
    queue.put(hasty := request(seconds=0.2))
    while not answers:
        time.sleep(0.001)
    assert answers == [[first, hasty]]
    queue.close(None)


def test_what_is_late_or_cancelled_leaves_its_place_to_others() -> None:
    held, answers = threading.Event(), Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        if len(answers) == 1:
            held.wait()

    queue = dispatcher(answer, bound=2, join=None)
    queue.put(request())
    while queue.waiting:
        time.sleep(0.001)
    queue.put(late := request(seconds=0.001))
    queue.put(cancelled := request())
    assert cancelled.future.cancel()
    while not late.late(time.monotonic()):
        time.sleep(0.001)
    queue.put(live := request())
    assert answers[1:] == [[late, cancelled]]  # to be refused, in the thread that needs the place
    assert queue.remove(live)
    assert not queue.remove(live)
    held.set()
    assert queue.close(None) == []


def test_a_worker_outlives_whatever_answering_does() -> None:
    answers = Answers()

    def answer(requests: list[Request]) -> None:
        answers.append(requests)
        raise SystemExit

    queue = dispatcher(answer, join=None)
    for _ in range(3):
        queue.put(request())
    assert queue.close(None) == []
    assert len(answers) == 3


def test_an_idle_worker_keeps_nothing_of_the_last_call() -> None:
    answered = threading.Event()
    queue = dispatcher(lambda _: answered.set(), join=None)
    last = request()
    kept = weakref.ref(last)
    queue.put(last)
    answered.wait()
    del last
    patience = time.monotonic() + 60
    while kept() is not None:
        assert time.monotonic() < patience
        time.sleep(0.001)
    queue.close(None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_load_for_itself() -> None:
    queue = dispatcher(lambda _: None, join=None)
    child = os.fork()
    if child == 0:
        try:
            queue.put(request())
        except SessionClosed as error:
            os._exit(0 if "load it after the fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_bound_and_an_end() -> None:
    held = threading.Event()

    def hold(_: list[Request]) -> None:
        held.wait()

    queue = dispatcher(hold, bound=2, join=None)
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
