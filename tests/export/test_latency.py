import gc
import json

import pytest

from tnm_pipeline.export import latency
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.latency import LatencyTable, measure


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
    rounds = {"slow": 0, "fast": 0}

    def call(name: str, nanoseconds: int) -> None:
        calls.append(name)
        clock.now += nanoseconds * (1 + drift * rounds[name])
        rounds[name] += 1

    callables = {"slow": lambda: call("slow", 2000), "fast": lambda: call("fast", 1000)}
    return measure(callables, repeats=101, warmup=3, baseline="slow")


def test_exact_figures(clock: Clock) -> None:
    slow, fast = _measure(clock, 0, []).rows
    assert (slow.median_us, slow.p95_us, slow.iqr_us, slow.ratio) == (2.0, 2.0, 0.0, 1.0)
    assert (fast.median_us, fast.ratio, fast.ratio_low, fast.ratio_high) == (1.0, 0.5, 0.5, 0.5)


def test_a_drifting_machine_does_not_move_the_ratio(clock: Clock) -> None:
    _, fast = _measure(clock, 1, []).rows
    assert fast.iqr_us > 0
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == (0.5, 0.5, 0.5)


def test_rounds_are_complete_and_shuffled(clock: Clock) -> None:
    calls: list[str] = []
    _measure(clock, 0, calls)
    rounds = [tuple(calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert len(rounds) == 104
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}


def test_interval_holds_one_for_the_same_work() -> None:
    table = measure({"a": lambda: sum(range(2000)), "b": lambda: sum(range(2000))}, repeats=40, warmup=2, baseline="a")
    assert all(row.ratio_low <= row.ratio <= row.ratio_high for row in table.rows)
    assert gc.isenabled()
    loaded = json.loads(json.dumps(table.to_dict()))
    assert [row["name"] for row in loaded["rows"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "absent"}, "'absent' is not measured; choose from a"),
        ({"repeats": 1}, "repeats must be 2"),
        ({"warmup": -1}, "warmup 0 or more"),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"baseline": "a", "repeats": 2, "warmup": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        measure({"a": lambda: None}, **options)  # type: ignore[arg-type]  # options of mixed types


def test_environment_is_plain_data() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["cores"] >= 1
    assert {"torch", "numpy", "onnx"} <= set(facts["packages"])
