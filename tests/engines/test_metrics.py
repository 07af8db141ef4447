import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnm_pipeline.engines.metrics import Distribution, Histogram, Recorder


@given(st.lists(st.floats(1e-6, 1000), min_size=1, max_size=300))
def test_quantiles_are_within_the_stated_error(times: list[float]) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.record(seconds)
    summary = histogram.summary()
    ordered = sorted(times)
    for part, stated in ((0.5, summary.p50), (0.95, summary.p95), (0.99, summary.p99)):
        exact = ordered[math.ceil(part * len(ordered)) - 1]
        assert exact / 1.045 <= stated <= exact * 1.045
    assert (summary.count, summary.longest) == (len(times), max(times))
    assert summary.total == pytest.approx(sum(times))


def test_times_beyond_the_buckets_are_counted() -> None:
    histogram = Histogram()
    for seconds in (0.0, 1e-9, 1e5):
        histogram.record(seconds)
    summary = histogram.summary()
    assert summary.count == 3
    assert summary.longest == 1e5
    assert summary.p50 == pytest.approx(1e-6, rel=0.05)


def test_no_times_have_no_quantiles() -> None:
    summary = Histogram().summary()
    assert summary == Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, summary.buckets)
    assert {count for _, count in summary.buckets} == {0}


@given(st.lists(st.floats(1e-6, 1000), max_size=300))
def test_buckets_count_what_is_below_their_bounds(times: list[float]) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.record(seconds)
    buckets = histogram.summary().buckets
    assert [bound for bound, _ in buckets] == [1e-6 * 2**octave for octave in range(1, 31)]
    for bound, count in buckets:
        assert sum(seconds < bound * (1 - 1e-9) for seconds in times) <= count
        assert count <= sum(seconds < bound * (1 + 1e-9) for seconds in times)


def test_nothing_is_lost_between_threads() -> None:
    recorder = Recorder()
    times = np.random.default_rng(0).uniform(1e-5, 1e-3, 500)

    def work() -> None:
        for seconds in times:
            recorder.ran(seconds, calls=3)
            recorder.queued(seconds)
            recorder.failed("FeedError")
            recorder.repeated()
        recorder.reloaded()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = recorder.read(waiting=1, running=2, fallback_reason="no GPU")
    assert (read.answered, read.runs, read.reloads, read.errors) == (6000, 2000, 4, {"FeedError": 2000})
    assert read.run.count == read.queue.count == read.repeated == 2000
    assert read.run.total == pytest.approx(4 * times.sum())
    assert (read.waiting, read.running, read.fallback_reason) == (1, 2, "no GPU")
