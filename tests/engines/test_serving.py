"""A session under many callers: queue, deadlines, cancelling, what it says. The networks are real ones."""

import asyncio
import logging
import time
from concurrent.futures import CancelledError, wait
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.callers import LONG, busy, feeds, in_threads, rows
from tnm_pipeline.engines import (
    Batching,
    Call,
    DeadlineExceeded,
    FeedError,
    Limits,
    Overloaded,
    Session,
    load,
)


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
