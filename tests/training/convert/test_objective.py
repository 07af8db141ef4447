"""The objective's sums against the same quantities computed from the data."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.bias import best_shift
from tnm_pipeline.training.convert.objective import Objective


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X (50, 8) with a mean, T (50, 6), W (6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64) + 2
    t = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return x, t, torch.randn(6, 8, generator=generator, dtype=torch.float64)


def test_error_equals_that_of_the_samples() -> None:
    x, t, w = data()
    shift = torch.arange(6.0)
    objective = Objective.of(x, t)
    assert objective.relative_error(w) == pytest.approx(float((x @ w.T - t).norm() / t.norm()))
    assert objective.relative_error(w, shift) == pytest.approx(float((x @ w.T + shift - t).norm() / t.norm()))


def test_batches_add_up() -> None:
    x, t, w = data()
    parts = Objective.of(x[:7], t[:7]) + Objective.of(x[7:], t[7:])
    assert parts.samples == 50
    assert parts.relative_error(w) == pytest.approx(Objective.of(x, t).relative_error(w))


def test_centred_objective_is_the_one_with_the_best_shift() -> None:
    x, t, w = data()
    objective = Objective.of(x, t)
    best = objective.squared_error(w, best_shift(objective, w))
    assert objective.centred().squared_error(w) == pytest.approx(best)
    assert best <= objective.squared_error(w, best_shift(objective, w) + 0.01)


def test_perfect_fit_is_zero_not_negative() -> None:
    x, _, w = data()
    assert 0 <= Objective.of(x, x @ w.T).relative_error(w) < 1e-6


@pytest.mark.parametrize(("scale", "error"), [(0.0, 0.0), (1.0, 1.0)])
def test_error_of_a_silent_layer(scale: float, error: float) -> None:
    x, t, w = data()
    assert Objective.of(x, t * 0).relative_error(w * scale) == error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_values_are_noticed(value: float) -> None:
    x, t, _ = data()
    x[3, 2] = value
    assert not Objective.of(x, t).is_finite()


def test_dead_inputs_are_counted() -> None:
    x, t, _ = data()
    x[:, 1] = 0
    assert Objective.of(x, t).live_inputs == 7
