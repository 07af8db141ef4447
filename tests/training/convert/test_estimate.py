"""Predicted errors against those of the changed layer on its inputs, computed in loops."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.admm import admm
from tnm_pipeline.training.convert.estimate import estimate_fitted, estimate_weight
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.meter import Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem
from tnm_pipeline.training.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def none() -> None:
    """No trial of the damping."""


def test_what_is_fitted_to_some_samples_is_tested_on_others() -> None:
    base, weight = drawn(4, 8).double(), drawn(4, 8)
    sides = [drawn(12, 8, seed=seed).double() + 1 for seed in (1, 2)]
    fitted, tested = (Objective.of(inputs, inputs @ base.T, base) for inputs in sides)
    repairs: list[Repair] = ["nothing", "shift"]
    for repair in repairs:
        relative, squared = estimate_fitted(fitted, tested, weight, TWO_FOUR, repair=repair, group=Group(), halves=none)
        goal = fitted.centred() if repair == "shift" else fitted
        errors = sides[1] @ (admm([Problem(goal, weight.double(), TWO_FOUR)], Group())[0].weight - base).T
        left = errors - errors.mean(0) if repair == "shift" else errors
        torch.testing.assert_close(squared, left.square().mean(0))
        assert relative == pytest.approx(float(left.norm() / (sides[1] @ base.T).norm()))
        assert (
            relative
            > estimate_fitted(
                fitted, fitted, weight, TWO_FOUR, repair=repair, group=Group(), halves=none
            ).relative_error
        )


def test_rows_that_workers_share_are_fitted_as_one() -> None:
    inputs, base = drawn(50, 8).double(), drawn(2 * 128 + 4, 8, seed=1).double()
    objective = Objective.of(inputs, inputs @ base.T, base)
    one, several = (
        estimate_fitted(
            objective,
            objective,
            base,
            Pattern(2, 4, transposable=True),
            repair="shift",
            group=Group(workers=count),
            halves=none,
        )
        for count in (1, 3)
    )
    assert torch.equal(one.squared_error, several.squared_error)


def test_a_re_tuned_batch_norm_takes_off_what_a_line_through_the_outputs_does() -> None:
    inputs, base, changed = drawn(60, 8).double() + 1, drawn(3, 8, seed=1).double(), drawn(3, 8, seed=2).double()
    outputs, errors = inputs @ base.T, inputs @ (changed - base).T
    _, squared = estimate_weight(Objective.of(inputs, outputs, base), changed, "shift and scale")
    for row in range(3):
        line = torch.stack([outputs[:, row], torch.ones(60, dtype=torch.float64)], 1)
        fitted = line @ torch.linalg.lstsq(line, errors[:, row, None]).solution
        assert float(squared[row]) == pytest.approx(float((errors[:, row, None] - fitted).square().mean()))


def test_silent_layers() -> None:
    """Where the dense layer returns zeros, only a change is an error."""
    inputs, base = drawn(10, 4).double(), torch.zeros(2, 4, dtype=torch.float64)
    objective = Objective.of(inputs, inputs @ base.T, base)
    assert estimate_weight(objective, base, "shift and scale").relative_error == 0.0
    assert estimate_weight(objective, base + 1, "shift and scale").relative_error == 1.0
