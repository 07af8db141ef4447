"""A session under many callers: queue, deadlines, batches, reloads, closing. The networks are real ones."""

import asyncio
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tnm_pipeline.engines import (
    ArtifactRejected,
    Batching,
    Call,
    DeadlineExceeded,
    FeedError,
    Limits,
    Overloaded,
    RunFailed,
    Session,
    SessionClosed,
    load,
    write_manifest,
)
from tnm_pipeline.engines.artifact import manifest_path, read_verified, sha256_of
from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend
from tnm_pipeline.engines.manifest import ExternalFile

LONG, SHORT = 200_000, 1  # rounds: a fifth of a second, and nothing


def feeds(rounds: int = SHORT, value: float = 1.0) -> dict[str, Any]:
    return {"input": np.full(3, value, np.float32), "rounds": np.array(rounds)}


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)}


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # to be raised in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def busy(session: Session, calls: int) -> Iterator[list[Future[dict[str, Any]]]]:
    """With that many long calls under way."""
    futures = [session.submit(feeds(LONG)) for _ in range(calls)]
    while session.metrics().waiting:
        time.sleep(0.001)
    yield futures
    wait(futures)


def test_threads_get_their_own_answers_in_all_three_ways(model: Path) -> None:
    with load(model, device="cpu") as session:
        alone = {seed: session.run(rows(seed % 5 + 1, seed))["output"] for seed in range(40)}

        def call(index: int) -> None:
            for seed in range(index, 40, 3):
                asked = rows(seed % 5 + 1, seed)
                for answer in (
                    session.run(asked),
                    session.submit(asked).result(),
                    asyncio.run(session.run_async(asked)),
                ):
                    np.testing.assert_array_equal(answer["output"], alone[seed])

        in_threads(3, call)
        metrics = session.metrics()
        assert metrics.answered == metrics.runs == metrics.run.count == 40 + 3 * 40
        assert metrics.queue.count == 2 * 40
        assert (metrics.errors, metrics.waiting, metrics.running) == ({}, 0, 0)


def test_a_full_queue_refuses_at_once_and_nothing_else_is_lost(patient_model: Path) -> None:
    with load(patient_model, device="cpu", limits=Limits(contexts=1, queue=2)) as session, busy(session, 1):
        waiting = [session.submit(feeds(value=value)) for value in (1, 2)]
        with pytest.raises(Overloaded, match="2 calls wait already"):
            session.submit(feeds())
        assert session.metrics().waiting == 2
        assert [future.result()["output"][0] for future in waiting] == [2, 3]
        assert session.metrics().errors == {"Overloaded": 1}


def test_no_context_is_free_in_time(patient_model: Path) -> None:
    limits = Limits(contexts=1, patience=0.02)
    with load(patient_model, device="cpu", limits=limits) as session, busy(session, 1):
        with pytest.raises(Overloaded, match=r"busy for 0\.02 s"):
            session.run(feeds())
        with pytest.raises(DeadlineExceeded):
            session.run(feeds(), timeout=0.001)
        assert session.metrics().errors == {"Overloaded": 1, "DeadlineExceeded": 1}


def test_a_deadline_drops_what_waits_and_spares_what_runs(patient_model: Path) -> None:
    with load(patient_model, device="cpu", limits=Limits(contexts=1)) as session:
        with busy(session, 1):
            late = session.submit(feeds(), timeout=0.01)
            in_time = session.submit(feeds(value=4), timeout=60)
            with pytest.raises(DeadlineExceeded, match=r"did not come within 0\.01 s"):
                late.result()
            assert in_time.result()["output"][0] == 5
        assert session.run(feeds(LONG), timeout=0.01)["output"][0] == 2  # begun at once, it runs to its end
        assert session.metrics().errors == {"DeadlineExceeded": 1}


def test_an_asyncio_call_learns_of_its_deadline_in_time(patient_model: Path) -> None:
    async def ask(session: Session) -> float:
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await session.run_async(feeds(), timeout=0.02)
        return time.monotonic() - begun

    with load(patient_model, device="cpu", limits=Limits(contexts=1)) as session, busy(session, 1) as (first,):
        assert asyncio.run(ask(session)) < 60
        assert not first.done()  # so it did not wait for its turn
        session.submit(feeds()).result()
        assert session.metrics().errors == {"DeadlineExceeded": 1}


def test_cancelling_drops_what_waits(patient_model: Path) -> None:
    async def ask_and_leave(session: Session) -> None:
        task = asyncio.create_task(session.run_async(feeds()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with load(patient_model, device="cpu", limits=Limits(contexts=1)) as session:
        with busy(session, 1):
            future = session.submit(feeds())
            assert future.cancel()
            with pytest.raises(CancelledError):
                future.result()
            asyncio.run(ask_and_leave(session))
            session.submit(feeds()).result()
        assert session.metrics().errors == {"CancelledError": 2}
        assert session.metrics().answered == 2


def test_calls_that_come_together_run_together(model: Path) -> None:
    batching = Batching(max_batch=8, max_delay=30)  # nothing but a full batch ends the wait
    with load(model, device="cpu") as alone, load(model, device="cpu", batching=batching) as session:
        asked = [rows(count, count) for count in (1, 2, 1, 3, 1)]
        futures = [session.submit(call) for call in asked]
        for call, future in zip(asked, futures, strict=True):
            np.testing.assert_allclose(future.result()["output"], alone.run(call)["output"], rtol=1e-6, atol=1e-6)
        metrics = session.metrics()
        assert (metrics.runs, metrics.answered) == (1, 5)
        in_threads(8, lambda index: np.testing.assert_equal(session.run(rows(1))["output"].shape, (1, 16)))
        assert session.metrics().runs == 2
        assert session.run(rows(9))["output"].shape == (9, 16)  # more than a batch by itself


def test_a_batch_that_does_not_fill_goes_after_its_delay(model: Path) -> None:
    with load(model, device="cpu", batching=Batching(max_batch=8, max_delay=0.01)) as session:
        begun = time.monotonic()
        assert session.run(rows(2))["output"].shape == (2, 16)
        assert time.monotonic() - begun >= 0.01
        assert session.metrics().queue.longest >= 0.01


def test_a_call_too_many_for_a_batch_waits_for_the_next(model: Path) -> None:
    with load(model, device="cpu", batching=Batching(max_batch=4, max_delay=30), limits=Limits(contexts=1)) as session:
        first, large, second = (session.submit(rows(count)) for count in (2, 3, 2))
        assert [len(future.result()["output"]) for future in (first, second)] == [2, 2]
        assert session.metrics().runs == 1
        assert len(session.submit(rows(1)).result()["output"]) == 1  # fills what was left over
        assert len(large.result()["output"]) == 3


def test_the_fault_of_one_call_is_not_its_neighbours(lookup_model: Path) -> None:
    with load(lookup_model, device="cpu", batching=Batching(max_batch=3, max_delay=30)) as session:
        futures = [session.submit({"ids": np.array([row])}) for row in (4, 99, 7)]
        with pytest.raises(RunFailed, match=r"lookup\.onnx fails on inputs of shapes \{'ids': \(1,\)\}"):
            futures[1].result()
        assert [futures[index].result()["output"].tolist() for index in (0, 2)] == [[[8, 9]], [[14, 15]]]
        assert session.metrics().errors == {"RunFailed": 1}
        assert session.metrics().answered == 2


def test_a_network_that_cannot_be_joined_is_refused_and_freed(
    patient_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[object] = []
    monkeypatch.setattr(OnnxRuntimeBackend, "close", lambda backend: freed.append(backend))
    with pytest.raises(ValueError, match="begin with one dynamic dimension"):
        load(patient_model, device="cpu", batching=Batching())
    assert len(freed) == 1


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_a_positive_time(model: Path, timeout: float) -> None:
    with load(model, device="cpu") as session:
        for ask in (session.run, session.submit, lambda *a, **k: asyncio.run(session.run_async(*a, **k))):
            with pytest.raises(ValueError, match="give a positive number of seconds"):
                ask(rows(1), timeout=timeout)
        assert session.run(rows(1), timeout=float("inf"))["output"].shape == (1, 16)
        assert session.submit(rows(1), timeout=1e300).result()["output"].shape == (1, 16)


def test_who_gives_up_leaves_the_queue_and_everybody_is_told(patient_model: Path) -> None:
    """Client timeouts must not lock out live calls."""
    told: list[Call] = []

    async def storm(session: Session) -> Any:
        calls = [session.run_async(feeds(), timeout=0.01) for _ in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    limits = Limits(contexts=1, queue=4)
    with load(patient_model, device="cpu", limits=limits, on_call=told.append) as session:
        with busy(session, 1):
            assert {type(error) for error in asyncio.run(storm(session))} == {DeadlineExceeded}
            assert session.submit(feeds()).cancel()
            assert session.metrics().waiting == 0
            assert session.metrics().errors == {"DeadlineExceeded": 3, "CancelledError": 1}
            assert [type(call.error).__name__ for call in told] == ["DeadlineExceeded"] * 3 + ["CancelledError"]
            live = [session.submit(feeds()) for _ in range(4)]
        wait(live)
        assert session.metrics().queue.count == 9  # the refused ones waited too


@pytest.mark.parametrize("fault", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
def test_no_observer_or_callback_takes_an_answer_or_a_thread(
    model: Path, fault: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise fault

    batching = Batching(max_batch=3, max_delay=30)
    with load(model, device="cpu", batching=batching, on_call=fail, limits=Limits(contexts=1)) as session:
        for _ in range(2):  # the worker lives on
            futures = [session.submit(rows(1)) for _ in range(3)]
            futures[0].add_done_callback(fail)
            for future in futures:
                assert future.result(60)["output"].shape == (1, 16)
    assert "the call itself did not" in caplog.text or fault is not ZeroDivisionError


def test_a_session_may_be_closed_by_who_observes_it(model: Path) -> None:
    """In the caller's thread after an error, and in a worker, by an observer and by a callback."""
    observed = load(model, device="cpu", on_call=lambda _: observed.close())
    with pytest.raises(FeedError):
        observed.run({})
    assert observed.closed
    working = load(model, device="cpu", on_call=lambda _: working.close())
    assert working.submit(rows(1)).result(60)["output"].shape == (1, 16)
    called = load(model, device="cpu")
    done = threading.Event()

    def close(_: object) -> None:
        called.close()
        done.set()

    called.submit(rows(1)).add_done_callback(close)
    assert done.wait(60)
    for session in (observed, working, called):
        session.close()
        assert session._engine.freed(60)


def test_a_runtime_that_fails_to_free_costs_no_answer(
    patient_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with load(patient_model, device="cpu") as session:
        backend: Any = session._engine.backend

        def fail() -> None:
            raise RuntimeError("sticky")

        monkeypatch.setattr(backend, "close", fail)
        with busy(session, 1) as (running,):
            session.reload()
        assert running.result()["output"][0] == 2
        assert session.run(feeds())["output"][0] == 2
        assert session.metrics().reloads == 1
    assert "patient.onnx was not freed cleanly" in caplog.text


def test_an_interpreter_that_ends_lets_runs_end_first(patient_model: Path) -> None:
    """Without it, ONNX Runtime is taken from under its threads, and the process aborts."""
    code = f"""
import sys
import numpy as np
from tnm_pipeline.engines import Limits, load
session = load(sys.argv[1], device="cpu", limits=Limits(contexts=2))
call = {{"input": np.ones(3, np.float32), "rounds": np.array({5 * LONG})}}
futures = [session.submit(call) for _ in range(6)]
for future in futures:
    future.add_done_callback(lambda done: print(type(done.exception()).__name__, flush=True))
while session.metrics().waiting > 4:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code, patient_model], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.split())
    assert len(said) == 6  # nobody waits for ever
    assert said[:2] == ["NoneType"] * 2
    assert said[-1] == "SessionClosed"


def replace(target: Path, source: Path) -> None:
    shutil.copyfile(source, target)
    shutil.copyfile(manifest_path(source), manifest_path(target))


def test_a_reload_swaps_while_calls_go_on(model: Path, other_model: Path, tmp_path: Path) -> None:
    """Every answer is the old network's or the new one's, and what is asked after the reload only the new one's."""
    old, new = (load(path, device="cpu").run(rows(2))["output"] for path in (model, other_model))
    live = tmp_path / model.name
    replace(live, model)
    with load(live, device="cpu") as session:
        first = session._engine
        stop, counts = threading.Event(), {"old": 0, "new": 0}

        def call(_: int) -> None:
            while not stop.is_set():
                answer = session.run(rows(2))["output"]
                which = "new" if (answer == new).all() else "old"
                assert which == "new" or (answer == old).all()
                counts[which] += 1

        def more(which: str) -> None:
            """Wait until somebody was answered by that one since."""
            before, patience = counts[which], time.monotonic() + 60
            while counts[which] < before + 10:
                assert time.monotonic() < patience
                time.sleep(0.001)

        def swap(index: int) -> None:
            if index > 0:
                return call(index)
            try:
                more("old")
                replace(live, other_model)
                session.reload()
                np.testing.assert_array_equal(session.run(rows(2))["output"], new)
                more("new")
                session.reload(model)
                np.testing.assert_array_equal(session.run(rows(2))["output"], old)
                more("old")
                session.reload(live)
            finally:
                stop.set()

        in_threads(4, swap)
        assert first.freed(60)
        assert session.metrics().reloads == 3


@pytest.mark.parametrize("fault", ["damaged", "others"])
def test_a_refused_reload_leaves_the_old_one_answering(model: Path, patient_model: Path, fault: str) -> None:
    with load(model, device="cpu") as session:
        before = session.run(rows(2))["output"]
        if fault == "damaged":
            model.write_bytes(model.read_bytes()[:-1])
            with pytest.raises(ArtifactRejected, match="its manifest states"):
                session.reload()
        else:
            with pytest.raises(ArtifactRejected, match=r"(?s)callers know .*goes on with model\.fp32\.onnx"):
                session.reload(patient_model)
        np.testing.assert_array_equal(session.run(rows(2))["output"], before)
        assert session.metrics().reloads == 0


@pytest.mark.parametrize("fate", ["removed", "truncated", "overwritten"])
def test_files_that_change_under_a_session_do_not_reach_it(model: Path, tmp_path: Path, fate: str) -> None:
    """Weights beside the graph too: ONNX Runtime alone would map their file, and die of a truncation."""
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(model), apart, save_as_external_data=True, location="apart.onnx.data", size_threshold=0)
    weights = tmp_path / "apart.onnx.data"
    facts = read_verified(model).manifest
    external = (ExternalFile(weights.name, sha256_of(weights), weights.stat().st_size),)
    stated = replace_fields(
        facts, artifact=apart.name, sha256=sha256_of(apart), bytes=apart.stat().st_size, external=external
    )
    write_manifest(apart, stated)
    with load(model, device="cpu") as inside, load(apart, device="cpu") as session:
        for path in (apart, weights):
            if fate == "removed":
                path.unlink()
            else:
                with path.open("r+b") as file:
                    file.write(b"\xff" * path.stat().st_size) if fate == "overwritten" else file.truncate(0)
        np.testing.assert_array_equal(session.run(rows(3))["output"], inside.run(rows(3))["output"])
        with pytest.raises(ArtifactRejected):
            session.reload()
        np.testing.assert_array_equal(session.run(rows(3))["output"], inside.run(rows(3))["output"])


def test_closing_lets_calls_end_and_refuses_new_ones(patient_model: Path) -> None:
    session = load(patient_model, device="cpu", limits=Limits(contexts=1))
    futures = [session.submit(feeds(LONG, value)) for value in (1, 2)]
    session.close()
    assert [future.result()["output"][0] for future in futures] == [2, 3]
    for ask in (session.run, session.submit):
        with pytest.raises(SessionClosed, match=r"patient\.onnx is closed"):
            ask(feeds())
    with pytest.raises(SessionClosed):
        session.reload()
    session.close()


def test_closing_in_a_hurry_drops_what_waits(patient_model: Path) -> None:
    session = load(patient_model, device="cpu", limits=Limits(contexts=1))
    with busy(session, 1) as (running,):
        waiting = session.submit(feeds())
        session.close(timeout=0.01)
        with pytest.raises(SessionClosed):
            waiting.result()
    assert running.result()["output"][0] == 2
    assert session._engine.freed(10)
    assert session.metrics().errors == {"SessionClosed": 1}


def test_what_is_on_a_gpu_has_no_place_on_the_cpu(model: Path) -> None:
    with load(model, device="cpu") as session, load(model, device="cpu", batching=Batching()) as joining:
        with pytest.raises(FeedError, match=r"runs on the CPU, and on_device asks for a GPU: pass numpy arrays"):
            session.run(rows(1), on_device=True)
        with pytest.raises(FeedError, match="runs on the CPU"):
            session.submit(rows(1), on_device=True).result()
        with pytest.raises(FeedError, match="joined in the memory of the host"):
            joining.run(rows(1), on_device=True)
        tensor = torch.from_numpy(rows(2)["input"])
        np.testing.assert_array_equal(session.run({"input": tensor})["output"], session.run(rows(2))["output"])


def test_a_wrong_feed_is_refused_before_it_queues(model: Path) -> None:
    with load(model, device="cpu", finite=True) as session:
        for ask in (session.run, session.submit):
            with pytest.raises(FeedError, match="missing inputs"):
                ask({})
            bad = rows(2)
            bad["input"][1, 3] = np.inf
            with pytest.raises(FeedError, match=r"input input is inf at \(1, 3\).*finite=False"):
                ask(bad)
        assert session.metrics().errors == {"FeedError": 4}
        assert session.run(rows(2))["output"].shape == (2, 16)


def test_calls_are_told_with_the_callers_context(patient_model: Path) -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    told: list[tuple[str, Call]] = []

    def listen(call: Call) -> None:
        told.append((who.get(), call))
        raise RuntimeError("must not matter")

    before = time.time_ns()
    with load(patient_model, device="cpu", on_call=listen) as session:
        who.set("runner")
        session.run(feeds(LONG))
        who.set("submitter")
        session.submit(feeds()).result()
        with pytest.raises(FeedError):
            session.run({})
    assert [name for name, _ in told] == ["runner", "submitter", "submitter"]
    ran, queued, failed = (call for _, call in told)
    assert (ran.artifact, ran.backend, ran.queue, ran.error) == ("patient.onnx", "onnxruntime", 0.0, None)
    assert ran.run > 0.01
    assert queued.queue > 0
    assert before <= ran.started <= ran.started + int(ran.run * 1e9) <= queued.started + 10**6
    assert isinstance(failed.error, FeedError)


def test_what_answers_and_why(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tnm_pipeline.engines"):
        limits = Limits(contexts=3)
        with load(model, device="cpu", limits=limits) as session:
            info = session.info
    assert (info.artifact, info.backend, info.device, info.precision) == (model.name, "onnxruntime", "cpu", "fp32")
    assert info.why == "model.fp32.onnx is an ONNX file"
    assert (info.fallback_reason, info.signed, info.batching, info.limits) == (None, False, None, limits)
    assert info.sparsity["pattern"] == "2:4"
    assert info.runtime == {"contexts": 3, "providers": ["CPUExecutionProvider"]}
    fields: list[Any] = [record.__dict__ for record in caplog.records]
    assert [(record["event"], record["artifact"]) for record in fields] == [
        ("loaded", model.name),
        ("closed", model.name),
    ]
    assert fields[0]["sha256"] == info.sha256


@pytest.mark.parametrize(
    "bounds",
    [
        {"contexts": 0},
        {"queue": 0},
        {"patience": 0.0},
        {"patience": float("nan")},
        {"patience": float("inf")},
        {"graphs": -1},
    ],
)
def test_bounds_without_sense_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**bounds)
