"""Which damping a layer gets, against trying all of them."""

import math

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.damping import GRID, Trial
from tnm_pipeline.training.convert.least_squares import refit
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import DAMPING, Problem
from tnm_pipeline.training.pattern import Pattern


def weights(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def samples(count: int, inputs: int, seed: int) -> Tensor:
    """Correlated columns, the same for every seed."""
    mixing = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ mixing + 1


def trial_of(w: Tensor, first: Tensor, second: Tensor, text: str = "2:4") -> Trial:
    def halves() -> tuple[Objective, Objective]:
        return Objective.of(first, first @ w.T, w), Objective.of(second, second @ w.T, w)

    return Trial(halves, w, Pattern.parse(text), "exact", centred=True)


@pytest.mark.parametrize("count", [30, 100, 3000])
@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_the_best_of_all_is_found(text: str, count: int) -> None:
    w = weights(16, 32)
    trial = trial_of(w, samples(count, 32, 1), samples(count, 32, 2), text)
    fitted, tested = (half.centred() for half in trial.halves() or ())
    norms = (fitted.gram + tested.gram).diagonal().sqrt()
    mask = Problem(fitted, w, trial.pattern).project(w, w.abs() * norms)
    errors = {}
    for damping in GRID:
        found = refit(fitted, w, mask, damping=1.5 * damping).weight
        scale = fitted.target_squares + tested.target_squares
        errors[damping] = float((tested.squared_errors(found) / scale).sum())
    assert trial.best() == min(errors, key=lambda damping: errors[damping])


def test_few_samples_want_more_damping_than_many() -> None:
    w = weights(16, 64)
    few = trial_of(w, samples(40, 64, 1), samples(40, 64, 2)).best()
    many = trial_of(w, samples(20_000, 64, 1), samples(20_000, 64, 2)).best()
    assert many == GRID[0]
    assert few > many


def test_silent_outputs_do_not_matter_and_silent_inputs_say_nothing() -> None:
    w = weights(9, 16)
    parts = samples(40, 16, 1), samples(40, 16, 2)
    sounding = trial_of(w[:8], *parts).best()
    w[8] = 0
    assert trial_of(w, *parts).best() == sounding != DAMPING
    nothing = torch.zeros(10, 16, dtype=torch.float64)
    assert trial_of(w, nothing, nothing).best() == DAMPING


def test_wide_rows_are_tried_by_conjugate_gradients() -> None:
    w = weights(16, 256)
    few = trial_of(w, samples(150, 256, 1), samples(150, 256, 2)).best()
    many = trial_of(w, samples(20_000, 256, 1), samples(20_000, 256, 2)).best()
    assert many < few


def test_a_problem_asks_once_for_all_its_rows() -> None:
    w, asked = weights(8, 16), []
    x = samples(50, 16, 1)

    def choose() -> float:
        asked.append(1)
        return 0.3

    problem = Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4), choose_damping=choose)
    assert [problem.rows(slice(start, start + 4)).damping for start in (0, 4)] == [0.3, 0.3]
    assert asked == [1]
    assert math.isclose(Problem(problem.objective, w, Pattern(2, 4)).damping, DAMPING)
