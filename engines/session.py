"""What production code holds: a session answers, from any thread, until it is closed."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tnm_pipeline.engines.arrays import CudaArray, Feed
from tnm_pipeline.engines.batching import Batching, Joiner
from tnm_pipeline.engines.calls import CallLog, Observer
from tnm_pipeline.engines.dispatch import Dispatcher, Request
from tnm_pipeline.engines.engine import Engine
from tnm_pipeline.engines.errors import ArtifactRejected, DeadlineExceeded, FeedError, SessionClosed
from tnm_pipeline.engines.info import SessionInfo
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.metrics import Metrics

_log = logging.getLogger("tnm_pipeline.engines")


class _End(NamedTuple):
    """What became of a call that was queued."""

    request: Request
    begun: float
    run: float
    joined: int
    outcome: dict[str, Any] | Exception


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
        self._changing = threading.RLock()  # held while the engine is exchanged
        self._closed = False
        self._engine = open_engine(path)
        try:
            self._joiner = self._join(self._engine)
        except ValueError:
            self._engine.retire()
            raise
        self._dispatcher = Dispatcher(
            self._answer,
            workers=limits.contexts,
            bound=limits.queue,
            max_rows=batching.max_batch if batching else 1,
            max_delay=batching.max_delay if batching else 0.0,
            max_padding=batching.max_padding if batching else 0.0,
            name=f"tnm-engines-{path.name}",
        )
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
        if self._batching:
            return _result(self.submit(feeds, timeout=timeout, on_device=on_device), timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        engine = self._open_engine()
        begun = time.perf_counter()
        try:
            answers = engine.backend.run(engine.check(feeds), deadline, on_device=on_device)
        except Exception as error:
            self._calls.failed(engine.manifest, error, run=time.perf_counter() - begun)
            raise
        finally:
            engine.leave()
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
        now = time.monotonic()
        engine = self._open_engine()
        try:
            checked = engine.check(feeds)
            joiner = self._joiner
            if joiner:
                _require_host(checked, on_device)
            request = Request(
                feeds=checked,
                future=Future(),
                deadline=None if timeout is None else now + timeout,
                queued=now,
                context=copy_context(),
                key=joiner.key(checked) if joiner else None,
                rows=joiner.rows(checked) if joiner else 1,
                size=joiner.size(checked) if joiner else 1,
                on_device=on_device,
            )
            self._dispatcher.put(request)
        except Exception as error:
            self._calls.failed(engine.manifest, error)
            raise
        finally:
            engine.leave()
        return request.future

    async def run_async(
        self, feeds: Mapping[str, Any], *, timeout: float | None = None, on_device: bool = False
    ) -> dict[str, Any]:
        """Like `run`, for asyncio, in one of the session's threads. Cancelling drops a call that still waits."""
        import asyncio  # a third of this package's time to import, and loaded wherever this is called

        future = self.submit(feeds, timeout=timeout, on_device=on_device)
        waiting = asyncio.wrap_future(future)
        try:
            await asyncio.wait({waiting}, timeout=timeout)
        except asyncio.CancelledError:
            future.cancel()
            raise
        if not waiting.done() and future.cancel():
            raise _too_late(timeout)
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
        with self._changing:
            old = self._engine
            if self._closed:
                raise SessionClosed(f"the session of {old.manifest.artifact} is closed: load it again")
            path = self._path if path is None else Path(path)
            new = self._open(path)
            try:
                _require_same(old.manifest, new.manifest)
                joiner = self._join(new)
            except ValueError as error:
                new.retire()
                raise ArtifactRejected(f"{error}. The session goes on with {old.manifest.artifact}") from error
            self._path, self._engine, self._joiner = path, new, joiner
            old.retire()
            self._calls.recorder.reloaded()
        self._tell(logging.WARNING if self.fallback_reason else logging.INFO, "reloaded")

    def close(self, timeout: float | None = None) -> None:
        """Refuse new calls, let those there are end, and free what the runtime holds. A second call does nothing.

        Args:
            timeout: Seconds after which calls that still wait are dropped with `SessionClosed`, and the rest of the
                work is left to the last call that runs; None: as long as they take.
        """
        with self._changing:
            if self._closed:
                return
            self._closed = True
        until = None if timeout is None else time.monotonic() + timeout
        dropped = self._dispatcher.close(timeout)
        for request in dropped:
            if request.future.set_running_or_notify_cancel():
                self._reject(request, _closed(self.manifest))
        self._engine.retire()
        self._engine.freed(None if until is None else max(0.0, until - time.monotonic()))
        self._tell(logging.INFO, "closed", dropped=len(dropped))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self, engine: Engine) -> Joiner | None:
        if self._batching is None:
            return None
        return Joiner(self._batching, engine.manifest.inputs, engine.manifest.outputs)

    def _open_engine(self) -> Engine:
        """The engine for a new call, to be left by the caller."""
        if self._closed:
            raise _closed(self.manifest)
        return self._entered()

    def _entered(self) -> Engine:
        while not (engine := self._engine).enter():
            if self._closed and engine is self._engine:
                raise _closed(engine.manifest)  # else another one took its place
        return engine

    def _answer(self, requests: list[Request]) -> None:
        """In a worker: answer what was gathered."""
        try:
            engine = self._entered()
        except SessionClosed as error:  # `close` did not wait
            for request in requests:
                if request.future.set_running_or_notify_cancel():
                    self._reject(request, error)
            return
        live = [request for request in requests if self._begins(request)]
        try:
            ends = self._run_together(engine, live) if live else []
        finally:
            engine.leave()
        for end in ends:  # the engine is left by now: who has the last answer may count on it
            self._resolve(engine, end)

    def _begins(self, request: Request) -> bool:
        """Whether anybody still waits for this answer."""
        now = time.monotonic()
        late = request.deadline is not None and now >= request.deadline
        if not request.future.set_running_or_notify_cancel():
            self._calls.recorder.failed(DeadlineExceeded.__name__ if late else "Cancelled")
            return False
        if late:
            assert request.deadline is not None, "what has no deadline is never late"
            self._reject(request, _too_late(request.deadline - request.queued))
            return False
        self._calls.recorder.queued(now - request.queued)
        return True

    def _run_together(self, engine: Engine, requests: list[Request]) -> list[_End]:
        calls = [request.feeds for request in requests]
        joiner = self._joiner
        begun = time.monotonic()
        try:
            if joiner is None or len(calls) == 1:
                (request,) = requests
                answers = [engine.backend.run(request.feeds, request.deadline, on_device=request.on_device)]
            else:
                answers = joiner.split(engine.backend.run(joiner.join(calls)), calls)
        except Exception as error:
            if len(requests) == 1:
                return [_End(requests[0], begun, time.monotonic() - begun, 1, error)]
            return [self._run_together(engine, [request])[0] for request in requests]  # the fault of one is its own
        seconds = time.monotonic() - begun
        self._calls.recorder.ran(seconds, len(requests))
        return [
            _End(request, begun, seconds, len(requests), answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _resolve(self, engine: Engine, end: _End) -> None:
        if isinstance(end.outcome, Exception):
            self._reject(end.request, end.outcome, end.run)
            return
        queue = end.begun - end.request.queued
        end.request.context.run(self._calls.tell, engine.manifest, queue, end.run, joined=end.joined)
        end.request.future.set_result(end.outcome)

    def _reject(self, request: Request, error: Exception, run: float = 0.0) -> None:
        queue = time.monotonic() - request.queued - run
        request.context.run(self._calls.failed, self.manifest, error, queue=queue, run=run)
        request.future.set_exception(error)

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


def _result(future: Future[dict[str, Any]], timeout: float | None) -> dict[str, Any]:
    """The answer of a queued call that is dropped after `timeout` seconds if its turn has not come."""
    try:
        return future.result(timeout)
    except TimeoutError:
        if future.done() or not future.cancel():
            return future.result()
        raise _too_late(timeout) from None


def _too_late(timeout: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(f"the turn of this call did not come within {timeout:g} s: allow more time, or send less")


def _closed(manifest: Manifest) -> SessionClosed:
    return SessionClosed(f"the session of {manifest.artifact} is closed: load it again to run it")


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
