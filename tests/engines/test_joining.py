"""Calls that come together run together, and each gets its own answer."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests.engines.callers import in_threads, rows
from tnm_pipeline.engines import (
    Batching,
    Limits,
    RunFailed,
    load,
)
from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend


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
    assert "the call itself did not" in caplog.text
