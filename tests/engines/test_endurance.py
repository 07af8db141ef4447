"""A minute of everything at once, as a service lives it."""

import asyncio
import gc
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tnm_pipeline.engines import Batching, DeadlineExceeded, Limits, Overloaded, Session, load

SECONDS, WARM = 60, 15
THREADS, SIZES, QUEUE = 8, (1, 2, 3, 5, 8, 13, 32), 16
REFUSED = (DeadlineExceeded, Overloaded)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells")


class Caller(threading.Thread):
    """Calls in all ways with random sizes and deadlines, and checks every answer."""

    def __init__(self, session: Session, seed: int, feeds: dict[int, Any], right: dict[int, list[Any]]) -> None:
        super().__init__()
        self.session, self.feeds, self.right = session, feeds, right
        self.random = random.Random(seed)  # noqa: S311  # nothing secret is drawn
        self.asked = self.answered = self.refused = self.deepest = 0
        self.until = time.monotonic() + SECONDS
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self.burst()
        except BaseException as error:
            self.fault = error

    def burst(self) -> None:
        """A few futures at a time, each to be answered or refused once, between calls that wait."""
        futures: list[tuple[int, Future[dict[str, Any]]]] = []
        for _ in range(self.random.randrange(1, 6)):
            size, timeout = self.random.choice(SIZES), self.random.choice([None, 10.0, 0.001, 1e-6])
            self.asked += 1
            try:
                futures.append((size, self.session.submit(self.feeds[size], timeout=timeout)))
            except REFUSED:
                self.refused += 1
            self.deepest = max(self.deepest, self.session.metrics().waiting)
        size = self.random.choice(SIZES)
        self.asked += 1
        timeout = self.random.choice([None, 0.001])
        try:
            if self.random.random() < 0.1:
                self.check(size, asyncio.run(self.session.run_async(self.feeds[size], timeout=timeout)))
            else:
                self.check(size, self.session.run(self.feeds[size], timeout=timeout))
        except REFUSED:
            self.refused += 1
        for size, future in futures:
            try:
                self.check(size, future.result(timeout=60))
            except REFUSED:
                self.refused += 1

    def check(self, size: int, answer: dict[str, Any]) -> None:
        assert any((answer["output"] == right).all() for right in self.right[size]), size
        self.answered += 1


@pytest.mark.slow
@pytest.mark.parametrize("batching", [None, Batching(max_batch=64, max_delay=0.001)], ids=["alone", "joined"])
def test_a_minute_of_load_reloads_and_deadlines(model: Path, other_model: Path, batching: Batching | None) -> None:
    """8 threads, mixed sizes, random deadlines, another network every 5 s: answers to the bit, no growth of memory.

    Joined calls have the same bits here because a layer of eight inputs is summed in one order whatever the batch;
    larger networks may round differently in a batch.
    """
    rng = np.random.default_rng(0)
    feeds = {size: {"input": rng.standard_normal((size, 8)).astype(np.float32)} for size in SIZES}
    paths = (model, other_model)
    right: dict[int, list[Any]] = {size: [] for size in SIZES}
    for path in paths:
        with load(path, device="cpu") as alone:
            for size in SIZES:
                right[size].append(alone.run(feeds[size])["output"])
    with load(model, device="cpu", limits=Limits(contexts=3, queue=QUEUE), batching=batching) as session:
        callers = [Caller(session, seed, feeds, right) for seed in range(THREADS)]
        begun = time.monotonic()
        for caller in callers:
            caller.start()
        reloads, grown = 0, []
        while any(caller.is_alive() for caller in callers):
            time.sleep(0.5)
            if time.monotonic() - begun > 5 * (reloads + 1):
                reloads += 1
                session.reload(paths[reloads % 2])
            if time.monotonic() - begun > WARM:
                grown.append(resident())
        for caller in callers:
            caller.join()
            if caller.fault:
                raise caller.fault
        metrics = session.metrics()
    asked, answered, refused = (
        sum(getattr(caller, what) for caller in callers) for what in ("asked", "answered", "refused")
    )
    print(  # noqa: T201  # with -s
        f"{asked} calls, {answered} answered, {refused} refused, {reloads} reloads, resident memory "
        f"{grown[0] / 2**20:.1f} to {grown[-1] / 2**20:.1f} MiB, run p99 {metrics.run.p99 * 1e3:.2f} ms"
    )
    assert asked == answered + refused
    assert (metrics.answered, sum(metrics.errors.values())) == (answered, refused)
    assert set(metrics.errors) <= {kind.__name__ for kind in REFUSED}
    assert metrics.reloads == reloads >= 10
    assert max(caller.deepest for caller in callers) <= QUEUE
    assert (metrics.waiting, metrics.running) == (0, 0)
    assert max(grown) <= 1.02 * grown[0]
