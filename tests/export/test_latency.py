import dataclasses
import gc
import itertools
import json

import pytest

from tnm_pipeline.export import gpu_state, latency
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.gpu_state import GpuState
from tnm_pipeline.export.latency import LatencyRow, LatencyTable, claim, measure


class Clock:
    """Nanoseconds that only calls move, so that expected figures are exact."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(latency, "time", fake)
    return fake


def _measure(clock: Clock, drift: int, calls: list[str]) -> LatencyTable:
    """`slow` takes twice `fast` in every round, while the machine gets slower by `drift` per round."""
    rounds = {"slow": 0, "fast": 0, "slow again": 0}

    def call(name: str, nanoseconds: int) -> None:
        calls.append(name)
        clock.now += nanoseconds * (1 + drift * rounds[name])
        rounds[name] += 1

    callables = {
        "slow": lambda: call("slow", 2000),
        "fast": lambda: call("fast", 1000),
        "slow again": lambda: call("slow again", 2000),
    }
    return measure(callables, repeats=101, warmup=3, baseline="slow", control="slow again", samples=8)


def test_exact_figures(clock: Clock) -> None:
    table = _measure(clock, 0, [])
    slow, fast, again = table.rows
    assert (slow.median_us, slow.p95_us, slow.iqr_us, slow.ratio, slow.samples_per_s) == (2.0, 2.0, 0.0, 1.0, 4e6)
    assert (fast.median_us, fast.ratio, fast.ratio_low, fast.ratio_high, fast.samples_per_s) == (1, 0.5, 0.5, 0.5, 8e6)
    assert (again.ratio, again.reach, fast.reach) == (1.0, 1.0, 2.0)
    assert claim(table, "fast").sentence == "fast is 2.00 times as fast as slow (2.00 to 2.00)"


def test_a_drifting_machine_does_not_move_the_ratio(clock: Clock) -> None:
    fast = _measure(clock, 1, []).row("fast")
    assert fast.iqr_us > 0
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == (0.5, 0.5, 0.5)


def test_rounds_are_complete_and_shuffled(clock: Clock) -> None:
    calls: list[str] = []
    _measure(clock, 0, calls)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 104
    assert set(rounds) == set(itertools.permutations(("slow", "fast", "slow again")))


def test_interval_holds_one_for_the_same_work() -> None:
    same = {name: lambda: sum(range(2000)) for name in "ab"}
    table = measure(same, repeats=40, warmup=2, baseline="a", control="b")
    assert all(row.ratio_low <= row.ratio <= row.ratio_high for row in table.rows)
    assert gc.isenabled()
    loaded = json.loads(json.dumps(table.to_dict()))
    assert [row["name"] for row in loaded["rows"]] == ["a", "b"]
    assert (loaded["looks"], loaded["disturbance"]) == ([], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "absent"}, "baseline 'absent' is not measured; choose from a"),
        ({"control": "absent"}, "control 'absent' is not measured; choose from a, b"),
        ({"control": "a"}, "baseline and control are both 'a'"),
        ({"repeats": 1}, "repeats must be 2"),
        ({"warmup": -1}, "warmup 0 or more"),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"baseline": "a", "control": "b", "repeats": 2, "warmup": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        measure({"a": lambda: None, "b": lambda: None}, **options)  # type: ignore[arg-type]  # options of mixed types


def row(name: str, low: float, high: float) -> LatencyRow:
    return LatencyRow(name, 1.0, 1.0, 0.0, (low + high) / 2, low, high, 1.0)


def table_of(sparse: tuple[float, float], again: tuple[float, float]) -> LatencyTable:
    rows = (row("dense", 1, 1), row("sparse", *sparse), row("dense again", *again))
    return LatencyTable("dense", "dense again", 200, 20, 8, rows, {})


QUIET, LOADED = (0.99, 1.01), (1.01, 1.03)


@pytest.mark.parametrize(
    ("sparse", "again", "key"),
    [
        ((0.90, 0.94), QUIET, "faster"),
        ((0.40, 0.60), QUIET, "faster"),  # by an uncertain factor, and faster for certain
        ((0.975, 0.985), LOADED, "no-difference"),  # the machine makes up 3%, more than there is
        ((0.80, 0.84), LOADED, "faster"),
        ((0.98, 1.01), QUIET, "no-difference"),
        ((0.94, 1.05), QUIET, "spread-too-wide"),
        ((0.98, 1.01), (1.2, 1.3), "spread-too-wide"),
        ((0.98, 1.01), (0.7, 0.8), "spread-too-wide"),
        ((0.97, 0.98), (0.97, 1.02), "no-difference"),  # the control holds 1, and reaches as far
        ((1.03, 1.06), QUIET, "dense-faster"),
        ((1.02, 1.03), LOADED, "no-difference"),
    ],
)
def test_a_claim_needs_more_than_the_machine_makes_up(
    sparse: tuple[float, float], again: tuple[float, float], key: str
) -> None:
    said = claim(table_of(sparse, again), "sparse")
    assert said.key == key
    assert bool(said.remedy) == (key != "faster")


def test_a_refusal_shows_what_was_too_wide() -> None:
    assert "sparse over dense is 0.94 to 1.06" in claim(table_of((0.94, 1.06), QUIET), "sparse").sentence
    assert "dense against itself 1.20 to 1.30" in claim(table_of((0.98, 1.01), (1.2, 1.3)), "sparse").sentence


def test_a_disturbed_gpu_is_looked_at_three_times_and_claims_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def read() -> GpuState:
        looked.append(clock.now)
        slowed = {"power limit": 0 if len(looked) < 3 else 10**9}
        return GpuState(len(looked) * 10**9, (), slowed, 1410, 1980, 80, 1, False)

    monkeypatch.setattr(gpu_state, "read", read)

    def call(nanoseconds: int) -> None:
        clock.now += nanoseconds

    callables = {"dense": lambda: call(1000), "sparse": lambda: call(500), "again": lambda: call(1000)}
    table = measure(callables, repeats=10, warmup=2, baseline="dense", control="again", on_gpu=True)
    assert looked == [5_000, 17_500, 30_000]
    assert len(table.looks) == 3
    assert claim(table, "sparse").key == "gpu-throttled"
    assert claim(dataclasses.replace(table, disturbance=None), "sparse").key == "faster"


def test_environment_is_plain_data() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["cores"] >= 1
    assert {"torch", "numpy", "onnx"} <= set(facts["packages"])
