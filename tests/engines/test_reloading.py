"""A session whose artifact is exchanged, whose files change, and that ends."""

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.engines.callers import LONG, busy, feeds, in_threads, rows
from tnm_pipeline.engines import (
    ArtifactRejected,
    FeedError,
    Limits,
    SessionClosed,
    load,
    write_manifest,
)
from tnm_pipeline.engines.artifact import manifest_path, read_verified, sha256_of
from tnm_pipeline.engines.manifest import ExternalFile


def replace(target: Path, source: Path) -> None:
    shutil.copyfile(source, target)
    shutil.copyfile(manifest_path(source), manifest_path(target))


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
call = {{"input": np.ones(3, np.float32), "rounds": np.array({2 * LONG})}}
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
