"""The calls that wait for a session's own threads, from the check of their inputs to their answers."""

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

from tnm_pipeline.engines.arrays import CudaArray, Feed
from tnm_pipeline.engines.batching import Batching, Extent, Join
from tnm_pipeline.engines.calls import CallLog
from tnm_pipeline.engines.dispatch import Dispatcher, Request
from tnm_pipeline.engines.engine import Engine
from tnm_pipeline.engines.errors import DeadlineExceeded, FeedError, RunFailed, SessionClosed
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest

_log = logging.getLogger("tnm_pipeline.engines")


# Failures that another call of the same batch need not share.
_OF_ONE_CALL = (FeedError, RunFailed, MemoryError)
_ALONE = Extent(1, (), 0)


class _End(NamedTuple):
    """What became of a call that was queued."""

    request: Request
    manifest: Manifest
    outcome: dict[str, Any] | Exception
    run: float = 0.0
    joined: int = 1


class CallQueue:
    """Checked calls, in a queue, answered by threads of its own. Thread-safe.

    Args:
        enter: The engine that answers now, entered; raises SessionClosed.
        calls: Where calls end.
        limits: Of the session.
        batching: How calls are joined, None where they are not.
        name: Of the threads.
    """

    def __init__(
        self, enter: Callable[[], Engine], calls: CallLog, *, limits: Limits, batching: Batching | None, name: str
    ) -> None:
        self._enter = enter
        self._calls = calls
        self._dispatcher = Dispatcher(
            self._answer,
            workers=limits.contexts,
            bound=limits.queue,
            join=Join(batching.max_batch, batching.max_delay, batching.max_padding) if batching else None,
            name=name,
        )

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return self._dispatcher.waiting

    def put(self, engine: Engine, feeds: Mapping[str, Any], deadline: float | None, on_device: bool) -> Request:
        """Check a call and have it wait.

        Args:
            engine: The one that answers now, entered by the caller.
            feeds: Input name -> array.
            deadline: By `time.monotonic()`, None for none.
            on_device: Leave the outputs on the GPU.

        Raises:
            FeedError: As `Session.run`.
            Overloaded: The queue is full.
            SessionClosed: After `close`.
        """
        checked = engine.check(feeds)
        joiner = engine.joiner
        if joiner:
            _require_host(checked, on_device)
        request = Request(
            feeds=checked,
            future=Future(),
            deadline=deadline,
            queued=time.monotonic(),
            context=copy_context(),
            key=joiner.key(checked) if joiner else None,
            extent=joiner.extent(checked) if joiner else _ALONE,
            on_device=on_device,
            manifest=engine.manifest,
        )
        self._dispatcher.put(request)
        # Weakly: a future that is kept must not keep what was asked.
        request.future.add_done_callback(partial(self._forget_cancelled, weakref.ref(request)))
        return request

    def wait(self, request: Request) -> dict[str, Any]:
        """The answer of a call; what `Session.run` raises."""
        if request.deadline is not None:
            wait([request.future], max(0.0, request.deadline - time.monotonic()))
            if not request.future.done():
                self.give_up(request)
        return request.future.result()

    def give_up(self, request: Request) -> None:
        """Refuse a call whose time is over, unless a worker has it already."""
        if self._dispatcher.remove(request):
            self._answer([request])

    def close(self, timeout: float | None, error: SessionClosed) -> int:
        """Take no more calls, and wait for those there are.

        Args:
            timeout: Seconds after which those that still wait are refused; None: never.
            error: What they are refused with.

        Returns:
            How many were.
        """
        return self._refuse(self._dispatcher.close(timeout), error)

    def drop(self, error: SessionClosed) -> None:
        """Take no more calls, and refuse those that wait."""
        self._refuse(self._dispatcher.drop(), error)

    def _refuse(self, requests: list[Request], error: SessionClosed) -> int:
        live = [request for request in requests if request.future.set_running_or_notify_cancel()]
        cancelled = [request for request in requests if request not in live]
        ends = [_End(request, request.manifest, error) for request in live]
        self._answer_all(ends + [_End(request, request.manifest, CancelledError()) for request in cancelled])
        return len(live)

    def _forget_cancelled(self, known: "weakref.ref[Request]", future: Future[dict[str, Any]]) -> None:
        """Take a call that was cancelled out of the queue."""
        request = known() if future.cancelled() else None
        if request is not None and self._dispatcher.remove(request):
            self._answer([request])

    def _answer(self, requests: list[Request]) -> None:
        """Answer what was gathered, and refuse what nobody waits for any more."""
        ends, live = [], []
        now = time.monotonic()
        for request in requests:
            if not request.future.set_running_or_notify_cancel():
                ends.append(_End(request, request.manifest, CancelledError("it was cancelled")))
            elif request.late(now):
                ends.append(_End(request, request.manifest, _too_late(request)))
            else:
                live.append(request)
            self._calls.recorder.queued(now - request.queued)
        if live:
            ends += self._run(live)
        self._answer_all(ends)

    def _run(self, requests: list[Request]) -> list[_End]:
        """Run what is live; whatever happens, there is an end for each."""
        try:
            engine = self._enter()
        except SessionClosed as error:  # `close` did not wait
            return [_End(request, request.manifest, error) for request in requests]
        try:
            return self._run_on(engine, requests)
        except BaseException as error:
            _log.exception("a run failed in a way that no backend should")
            failure = RunFailed(f"{engine.manifest.artifact}: {type(error).__name__}: {error}: report this")
            return [_End(request, engine.manifest, failure) for request in requests]
        finally:
            engine.leave()  # before anybody is told

    def _run_on(self, engine: Engine, requests: list[Request]) -> list[_End]:
        joiner = engine.joiner
        begun = time.monotonic()
        try:
            calls = [engine.check(request.feeds) for request in requests]  # again: a reload may have other ranges
            if joiner is None or len(calls) == 1:
                (request,), (feeds,) = requests, calls
                answers = [engine.backend.run(feeds, request.deadline, on_device=request.on_device)]
            else:
                answers = joiner.split(engine.backend.run(joiner.join(calls), _latest(requests)), calls)
        except _OF_ONE_CALL as error:
            if len(requests) == 1:
                return [_End(requests[0], engine.manifest, error, time.monotonic() - begun)]
            self._calls.recorder.repeated()
            _log.warning("a run of %d joined calls failed, each runs alone: %s", len(requests), error)
            return [self._run_on(engine, [request])[0] for request in requests]
        except Exception as error:
            return [_End(request, engine.manifest, error, time.monotonic() - begun) for request in requests]
        seconds = time.monotonic() - begun
        self._calls.recorder.ran(seconds, len(requests))
        return [
            _End(request, engine.manifest, answer, seconds, len(requests))
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _answer_all(self, ends: list[_End]) -> None:
        """Tell who observes and who waits, each whatever the others do with it."""
        for end in ends:
            try:
                self._answer_one(end)
            except BaseException:  # of an observer or a callback, in a thread of ours
                _log.exception("who was told of a call failed; the call itself did not")

    def _answer_one(self, end: _End) -> None:
        request, outcome = end.request, end.outcome
        queue = max(0.0, time.monotonic() - request.queued - end.run)
        try:
            if isinstance(outcome, Exception):
                request.context.run(self._calls.failed, end.manifest, outcome, queue=queue, run=end.run)
            else:
                request.context.run(self._calls.tell, end.manifest, queue, end.run, joined=end.joined)
        finally:
            if isinstance(outcome, CancelledError):
                pass  # the future says so itself
            elif isinstance(outcome, Exception):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)


def _too_late(request: Request) -> DeadlineExceeded:
    assert request.deadline is not None, "what has no deadline is never late"
    given = request.deadline - request.queued
    return DeadlineExceeded(f"the turn of this call did not come within {given:.2g} s: allow more time, or send less")


def _latest(requests: list[Request]) -> float | None:
    """When the last of them gives up waiting for a context; None where one of them does not."""
    deadlines = [request.deadline for request in requests if request.deadline is not None]
    return max(deadlines) if len(deadlines) == len(requests) else None


def _require_host(feeds: Mapping[str, Feed], on_device: bool) -> None:
    if on_device or any(isinstance(feed, CudaArray) for feed in feeds.values()):
        raise FeedError("calls are joined in the memory of the host: pass numpy arrays, or load without batching")
