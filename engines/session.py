"""What production code holds: a session answers, from any thread, until it is closed."""

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tnm_pipeline.engines.arrays import CudaArray, Feed
from tnm_pipeline.engines.batching import Batching, Extent, Join, Joiner
from tnm_pipeline.engines.calls import CallLog, Observer
from tnm_pipeline.engines.dispatch import Dispatcher, Request
from tnm_pipeline.engines.engine import Engine
from tnm_pipeline.engines.errors import ArtifactRejected, DeadlineExceeded, FeedError, RunFailed, SessionClosed
from tnm_pipeline.engines.info import SessionInfo
from tnm_pipeline.engines.limits import Limits, deadline_after
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.metrics import Metrics

_log = logging.getLogger("tnm_pipeline.engines")


# Failures that another call of the same batch need not share.
_OF_ONE_CALL = (FeedError, RunFailed, MemoryError)
_ALONE = Extent(1, (), 0)
_unclosed: "weakref.WeakSet[Session]" = weakref.WeakSet()


class _End(NamedTuple):
    """What became of a call that was queued."""

    request: Request
    outcome: dict[str, Any] | Exception
    run: float = 0.0
    joined: int = 1


class Session:
    """A loaded artifact. Thread-safe. Made by `load`; to be closed or used as a context manager.

    `run` answers in the caller's thread; `submit` and `run_async` queue a call for the session's own threads. With
    batching, all of them queue, and calls that come together run together.

    A timeout bounds how long a call waits for its turn. A network that has begun runs to its end.
    """

    def __init__(
        self,
        path: Path,
        open_engine: Callable[[Path], Engine],
        *,
        limits: Limits,
        batching: Batching | None,
        on_call: Observer | None,
    ) -> None:
        self._path = path
        self._open = open_engine
        self._limits = limits
        self._batching = batching
        self._calls = CallLog(on_call)
        self._reloading = threading.Lock()  # held while a new engine is opened
        self._changing = threading.Lock()  # held while it takes its place
        self._closed = False
        self._engine = self._opened(path)
        self._dispatcher = Dispatcher(
            self._answer,
            workers=limits.contexts,
            bound=limits.queue,
            join=Join(batching.max_batch, batching.max_delay, batching.max_padding) if batching else None,
            name=f"tnm-engines-{path.name}",
        )
        _unclosed.add(self)
        self._tell(logging.WARNING if self.fallback_reason else logging.INFO, "loaded")

    @property
    def manifest(self) -> Manifest:
        """The manifest of the artifact that answers: after a fallback, the source ONNX's."""
        return self._engine.manifest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype, shape and ranges of every input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every output."""
        return self.manifest.outputs

    @property
    def backend(self) -> str:
        """The runtime that answers: `"onnxruntime"`, `"tensorrt"` or `"tensorrt_rtx"`."""
        return self.manifest.backend

    @property
    def device(self) -> str:
        """Where it answers: `"cpu"` or `"cuda"`."""
        return self._engine.backend.device

    @property
    def fallback_reason(self) -> str | None:
        """Why the plan does not answer, None where the artifact that was asked for does."""
        return self._engine.fallback_reason

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._closed

    @property
    def info(self) -> SessionInfo:
        """What answers, and why."""
        engine = self._engine
        manifest = engine.manifest
        return SessionInfo(
            artifact=manifest.artifact,
            sha256=manifest.sha256,
            backend=manifest.backend,
            backend_version=engine.backend.version,
            device=engine.backend.device,
            why=engine.why,
            fallback_reason=engine.fallback_reason,
            precision=manifest.precision,
            sparsity=manifest.sparsity,
            sparse_weights_flag=manifest.sparse_weights_flag,
            signed=engine.signed,
            limits=self._limits,
            batching=self._batching,
            runtime=engine.describe(),
        )

    def metrics(self) -> Metrics:
        """Counts and times so far."""
        engine = self._engine
        return self._calls.recorder.read(
            waiting=self._dispatcher.waiting, running=engine.calls, fallback_reason=engine.fallback_reason
        )

    def run(self, feeds: Mapping[str, Any], *, timeout: float | None = None, on_device: bool = False) -> dict[str, Any]:
        """Run the network once, and wait for the answer.

        Args:
            feeds: Input name -> array of exactly the dtype and shape in `inputs`: numpy's; on the CPU what speaks
                DLPack (torch, jax); on the GPU, where the session runs there, what has the CUDA array interface (torch,
                cupy). None of them is copied on the way.
            timeout: Seconds to wait for a free context, and with batching in the queue; None: `Limits.patience`.
            on_device: Leave the outputs on the GPU, as `DeviceArray`.

        Returns:
            Output name -> numpy array, owned by the caller.

        Raises:
            FeedError: An array is missing, unexpected, or of the wrong dtype, rank, size or value.
            DeadlineExceeded: The turn of this call did not come in time.
            Overloaded: No context became free, or with batching the queue is full.
            RunFailed: The runtime failed on these inputs; the session goes on.
            SessionClosed: After `close`.
        """
        deadline = deadline_after(timeout)
        if self._batching:
            return self._wait(self._queue(feeds, deadline, on_device))
        engine = self._open_engine()
        begun = time.perf_counter()
        try:
            try:
                answers = engine.backend.run(engine.check(feeds), deadline, on_device=on_device)
            finally:
                engine.leave()  # before anybody is told: who observes may close the session
        except Exception as error:
            self._calls.failed(engine.manifest, error, run=time.perf_counter() - begun)
            raise
        self._calls.ran(engine.manifest, time.perf_counter() - begun)
        return answers

    def submit(
        self, feeds: Mapping[str, Any], *, timeout: float | None = None, on_device: bool = False
    ) -> Future[dict[str, Any]]:
        """Queue a call for the session's threads.

        Args:
            feeds: As for `run`; the arrays must not change until the future is done.
            timeout: Seconds after which the call is dropped if its turn has not come; its future learns so when the
                turn would have come.
            on_device: As for `run`.

        Returns:
            The future of the answer. It holds what `run` would raise; cancelling it drops a call that still waits.

        Raises:
            FeedError: As `run`.
            Overloaded: The queue is full.
            SessionClosed: After `close`.
        """
        return self._queue(feeds, deadline_after(timeout), on_device).future

    async def run_async(
        self, feeds: Mapping[str, Any], *, timeout: float | None = None, on_device: bool = False
    ) -> dict[str, Any]:
        """Like `run`, for asyncio, in one of the session's threads. Cancelling drops a call that still waits."""
        import asyncio  # a third of this package's time to import, and loaded wherever this is called

        request = self._queue(feeds, deadline_after(timeout), on_device)
        waiting = asyncio.wrap_future(request.future)
        left = None if request.deadline is None else request.deadline - time.monotonic()
        try:
            await asyncio.wait({waiting}, timeout=left)
        except asyncio.CancelledError:
            request.future.cancel()
            raise
        if not waiting.done():
            self._give_up(request)
        return await waiting

    def reload(self, path: str | Path | None = None) -> None:
        """Exchange the artifact while calls go on: those under way end on the old one, the next go to the new one.

        Everything about the new one is checked first, as `load` does; if it is refused, the old one goes on.

        Args:
            path: The new artifact; None: the path that was loaded, whose file was replaced.

        Raises:
            ArtifactRejected: As `load`; or its inputs and outputs have other names, dtypes or shapes.
            EnvironmentLacks: As `load`.
            SessionClosed: After `close`.
        """
        with self._reloading:
            old = self._engine
            path = self._path if path is None else Path(path)
            self._require_open()
            try:
                new = self._opened(path, old.manifest)
            except ArtifactRejected as error:
                error.add_note(f"the session goes on with {old.manifest.artifact}")
                raise
            with self._changing:
                if not self._closed:
                    self._path, self._engine = path, new
            if self._engine is not new:  # closed while the new one was opened
                new.retire()
                self._require_open()
            old.retire()
            self._calls.recorder.reloaded()
        self._tell(logging.WARNING if self.fallback_reason else logging.INFO, "reloaded")

    def close(self, timeout: float | None = None) -> None:
        """Refuse new calls, let those there are end, and free what the runtime holds. A second call does no harm.

        Args:
            timeout: Seconds after which calls that still wait are dropped with `SessionClosed`, and the rest of the
                work is left to the last call that runs; None: as long as they take.
        """
        until = None if timeout is None else time.monotonic() + min(max(timeout, 0.0), threading.TIMEOUT_MAX / 2)
        with self._changing:
            self._closed = True
        dropped = self._dispatcher.close(None if until is None else until - time.monotonic())
        self._answer_all([_End(request, _closed(self.manifest)) for request in dropped])
        first = self._engine.retire()
        self._engine.freed(None if until is None else max(0.0, until - time.monotonic()))
        _unclosed.discard(self)
        if first:
            self._tell(logging.INFO, "closed", dropped=len(dropped))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, path: Path, known: Manifest | None = None) -> Engine:
        """A new engine that takes what callers know, if `known`, and whose calls can be joined, if that is wanted."""
        engine = self._open(path)
        try:
            if known:
                _require_same(known, engine.manifest)
            if self._batching:
                engine.joiner = Joiner(self._batching, engine.manifest.inputs, engine.manifest.outputs)
        except ValueError as error:
            engine.retire()
            if known and not isinstance(error, ArtifactRejected):
                raise ArtifactRejected(str(error)) from error
            raise
        return engine

    def _require_open(self) -> None:
        if self._closed:
            raise _closed(self.manifest)

    def _open_engine(self) -> Engine:
        """The engine for a new call, to be left by the caller."""
        try:
            self._require_open()
            return self._entered()
        except SessionClosed as error:
            self._calls.failed(self.manifest, error)
            raise

    def _entered(self) -> Engine:
        while not (engine := self._engine).enter():
            if self._closed:
                raise _closed(engine.manifest)  # else another one took its place
        return engine

    def _queue(self, feeds: Mapping[str, Any], deadline: float | None, on_device: bool) -> Request:
        """Check a call and have it wait."""
        engine = self._open_engine()
        try:
            try:
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
                )
                self._dispatcher.put(request)
            finally:
                engine.leave()
        except Exception as error:
            self._calls.failed(engine.manifest, error)
            raise
        # Weakly: a future that is kept must not keep what was asked.
        request.future.add_done_callback(partial(self._forget_cancelled, weakref.ref(request)))
        return request

    def _wait(self, request: Request) -> dict[str, Any]:
        """The answer of a queued call, or that it came too late."""
        if request.deadline is not None:
            wait([request.future], max(0.0, request.deadline - time.monotonic()))
            if not request.future.done():
                self._give_up(request)
        return request.future.result()

    def _give_up(self, request: Request) -> None:
        """Refuse a call whose time is over, unless a worker has it already."""
        if self._dispatcher.remove(request):
            self._answer([request])

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
                ends.append(_End(request, CancelledError("it was cancelled")))
            elif request.late(now):
                ends.append(_End(request, _too_late(request)))
            else:
                live.append(request)
            self._calls.recorder.queued(now - request.queued)
        if live:
            ends += self._run(live)
        self._answer_all(ends)

    def _run(self, requests: list[Request]) -> "list[_End]":
        """Run what is live; whatever happens, there is an end for each."""
        try:
            engine = self._entered()
        except SessionClosed as error:  # `close` did not wait
            return [_End(request, error) for request in requests]
        try:
            return self._run_on(engine, requests)
        except BaseException as error:
            _log.exception("a run failed in a way that no backend should")
            failure = RunFailed(f"{engine.manifest.artifact}: {type(error).__name__}: {error}: report this")
            return [_End(request, failure) for request in requests]
        finally:
            engine.leave()  # before anybody is told

    def _run_on(self, engine: Engine, requests: list[Request]) -> "list[_End]":
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
                return [_End(requests[0], error, time.monotonic() - begun)]
            self._calls.recorder.repeated()
            _log.warning("a run of %d joined calls failed, each runs alone: %s", len(requests), error)
            return [self._run_on(engine, [request])[0] for request in requests]
        except Exception as error:
            return [_End(request, error, time.monotonic() - begun) for request in requests]
        seconds = time.monotonic() - begun
        self._calls.recorder.ran(seconds, len(requests))
        return [_End(*pair, seconds, len(requests)) for pair in zip(requests, answers, strict=True)]

    def _answer_all(self, ends: "list[_End]") -> None:
        """Tell who observes and who waits, each whatever the others do with it."""
        for end in ends:
            try:
                self._answer_one(end)
            except BaseException:  # of an observer or a callback, in a thread of ours
                _log.exception("who was told of a call failed; the call itself did not")

    def _answer_one(self, end: "_End") -> None:
        request, outcome = end.request, end.outcome
        queue = max(0.0, time.monotonic() - request.queued - end.run)
        try:
            if isinstance(outcome, Exception):
                request.context.run(self._calls.failed, self.manifest, outcome, queue=queue, run=end.run)
            else:
                request.context.run(self._calls.tell, self.manifest, queue, end.run, joined=end.joined)
        finally:
            if isinstance(outcome, CancelledError):
                pass  # the future says so itself
            elif isinstance(outcome, Exception):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)

    def _tell(self, level: int, event: str, **facts: object) -> None:
        """One line for people, and the same as fields for machines."""
        engine = self._engine
        known: dict[str, object] = {
            "event": event,
            "artifact": engine.manifest.artifact,
            "sha256": engine.manifest.sha256,
            "backend": self.backend,
            "device": self.device,
            "why": engine.why,
            **facts,
        }
        message = "%(event)s %(artifact)s on %(backend)s, %(device)s: %(why)s"
        _log.log(level, message, known, extra=known)


@atexit.register
def _end_all() -> None:
    """Let what runs end before the interpreter does, which else takes the runtime from under it and aborts."""
    for session in list(_unclosed):
        session._answer_all([_End(request, _closed(session.manifest)) for request in session._dispatcher.drop()])
        session.close()


def _too_late(request: Request) -> DeadlineExceeded:
    assert request.deadline is not None, "what has no deadline is never late"
    given = request.deadline - request.queued
    return DeadlineExceeded(f"the turn of this call did not come within {given:.2g} s: allow more time, or send less")


def _closed(manifest: Manifest) -> SessionClosed:
    return SessionClosed(f"the session of {manifest.artifact} is closed: load it again to run it")


def _latest(requests: list[Request]) -> float | None:
    """When the last of them gives up waiting for a context; None where one of them does not."""
    deadlines = [request.deadline for request in requests if request.deadline is not None]
    return max(deadlines) if len(deadlines) == len(requests) else None


def _require_host(feeds: Mapping[str, Feed], on_device: bool) -> None:
    if on_device or any(isinstance(feed, CudaArray) for feed in feeds.values()):
        raise FeedError("calls are joined in the memory of the host: pass numpy arrays, or load without batching")


def _require_same(old: Manifest, new: Manifest) -> None:
    """What callers send must fit the new artifact as well; its ranges may differ."""
    for side, known, found in (("inputs", old.inputs, new.inputs), ("outputs", old.outputs, new.outputs)):
        expected, actual = ([(spec.name, spec.dtype, spec.shape) for spec in specs] for specs in (known, found))
        if expected != actual:
            raise ArtifactRejected(
                f"the {side} of {new.artifact} are {actual}, and callers know {expected}: load it as a session of its "
                "own"
            )
