"""How far a build is: estimates against builds whose duration is known."""

import pytest

from tnm_pipeline.export.building.progress import BuildProgress, Phases


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_even_steps_are_estimated_exactly() -> None:
    """4 outer steps, each of 5 inner ones that take 2 s: 40 s in all."""
    clock = Clock()
    phases = Phases(clock)
    phases.start("outer", 4)
    for outer in range(4):
        phases.start("inner", 5)
        for inner in range(5):
            clock.now += 2.0
            step = phases.step("inner", inner + 1)
            assert (step.phase, step.done, step.total) == ("inner", inner + 1, 5)
            assert step.seconds_left == pytest.approx(140.0 - clock.now)
        phases.finish("inner")
        assert phases.step("outer", outer + 1).seconds_left == pytest.approx(140.0 - clock.now)
    phases.finish("outer")


def test_nothing_is_estimated_from_too_little() -> None:
    clock = Clock()
    phases = Phases(clock)
    phases.start("a", 10)
    clock.now += 0.5
    assert phases.step("a", 1).seconds_left is None


def test_time_passes_between_steps() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.now += 9
    assert phases.tick() == BuildProgress("Reading the graph", 0, 1, None)
    phases.start("a", 10)
    clock.now += 2
    assert phases.step("a", 1).seconds_left == pytest.approx(18.0)
    clock.now += 8
    assert phases.tick().seconds_left == pytest.approx(10.0)
    clock.now += 11
    assert phases.tick() == BuildProgress("a", 1, 10, 0.0)


def test_a_step_of_a_phase_that_has_ended() -> None:
    assert Phases(Clock()).step("a", 3) == BuildProgress("a", 3, 3, None)


def test_a_phase_may_do_more_steps_than_it_announced() -> None:
    clock = Clock()
    phases = Phases(clock)
    phases.start("a", 1)
    clock.now += 3
    phases.step("a", 1)
    assert phases.step("a", 2) == BuildProgress("a", 2, 1, 0.0)
