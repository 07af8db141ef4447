"""What production code holds: a session answers, from any thread, until it is closed."""

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tnm_pipeline.engines.batching import Batching, Joiner
from tnm_pipeline.engines.call_queue import CallQueue
from tnm_pipeline.engines.calls import CallLog, Observer
from tnm_pipeline.engines.dispatch import Request
from tnm_pipeline.engines.engine import Engine
from tnm_pipeline.engines.errors import ArtifactRejected, SessionClosed
from tnm_pipeline.engines.info import SessionInfo
from tnm_pipeline.engines.limits import Limits, deadline_after
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.metrics import Metrics

_log = logging.getLogger("tnm_pipeline.engines")
_log.addHandler(logging.NullHandler())  # quiet unless the application wants logs


_LONGEST = threading.TIMEOUT_MAX / 2
_unclosed: "weakref.WeakSet[Session]" = weakref.WeakSet()


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
        self._queue = CallQueue(
            self._entered, self._calls, limits=limits, batching=batching, name=f"tnm-engines-{path.name}"
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
            waiting=self._queue.waiting, running=engine.calls, fallback_reason=engine.fallback_reason
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
            return self._queue.wait(self._queued(feeds, deadline, on_device))
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
        return self._queued(feeds, deadline_after(timeout), on_device).future

    async def run_async(
        self, feeds: Mapping[str, Any], *, timeout: float | None = None, on_device: bool = False
    ) -> dict[str, Any]:
        """Like `run`, for asyncio, in one of the session's threads. Cancelling drops a call that still waits."""
        import asyncio  # a third of this package's time to import, and loaded wherever this is called

        request = self._queued(feeds, deadline_after(timeout), on_device)
        waiting = asyncio.wrap_future(request.future)
        left = None if request.deadline is None else request.deadline - time.monotonic()
        try:
            await asyncio.wait({waiting}, timeout=left)
        except asyncio.CancelledError:
            request.future.cancel()
            raise
        if not waiting.done():
            self._queue.give_up(request)
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
        until = None if timeout is None else time.monotonic() + min(timeout if timeout > 0 else 0.0, _LONGEST)
        with self._changing:
            self._closed = True
        dropped = self._queue.close(None if until is None else until - time.monotonic(), _closed(self.manifest))
        first = self._engine.retire()
        self._engine.freed(None if until is None else max(0.0, until - time.monotonic()))
        _unclosed.discard(self)
        if first:
            self._tell(logging.INFO, "closed", dropped=dropped)

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

    def _queued(self, feeds: Mapping[str, Any], deadline: float | None, on_device: bool) -> Request:
        engine = self._open_engine()
        try:
            try:
                return self._queue.put(engine, feeds, deadline, on_device)
            finally:
                engine.leave()
        except Exception as error:
            self._calls.failed(engine.manifest, error)
            raise

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
        session._queue.drop(_closed(session.manifest))
        session.close()


def _closed(manifest: Manifest) -> SessionClosed:
    return SessionClosed(f"the session of {manifest.artifact} is closed: load it again to run it")


def _require_same(old: Manifest, new: Manifest) -> None:
    """What callers send must fit the new artifact as well; its ranges may differ."""
    for side, known, found in (("inputs", old.inputs, new.inputs), ("outputs", old.outputs, new.outputs)):
        expected, actual = ([(spec.name, spec.dtype, spec.shape) for spec in specs] for specs in (known, found))
        if expected != actual:
            raise ArtifactRejected(
                f"the {side} of {new.artifact} are {actual}, and callers know {expected}: load it as a session of its "
                "own"
            )
