"""The objective's sums against the same quantities computed from the data."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.bias import best_shift
from tnm_pipeline.training.convert.objective import Objective


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X (50, 8) with a mean, T (50, 6), W and B (6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64) + 2
    t = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    w, b = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, t, w, b


@pytest.mark.parametrize("based", [False, True])
def test_error_equals_that_of_the_samples(based: bool) -> None:
    x, t, w, b = data()
    shift = torch.arange(6.0)
    objective = Objective.of(x, t, b if based else None)
    for d in (None, shift):
        output = x @ w.T if d is None else x @ w.T + d
        assert objective.relative_error(w, d) == pytest.approx(float((output - t).norm() / t.norm()))
        by_output = torch.stack([(output[:, o] - t[:, o]).square().sum() for o in range(6)])
        torch.testing.assert_close(objective.squared_errors(w, d), by_output)


def test_sums_around_any_weights_say_the_same() -> None:
    x, t, w, b = data()
    plain, around = Objective.of(x, t), Objective.of(x, t, b)
    torch.testing.assert_close(around.cross, t.T @ x)
    torch.testing.assert_close(plain.cross, t.T @ x)
    assert around.relative_error(w) == pytest.approx(plain.relative_error(w))
    assert around.centred().relative_error(w) == pytest.approx(plain.centred().relative_error(w))


def test_no_large_terms_cancel_near_the_base() -> None:
    x, _, w, _ = data()
    objective = Objective.of(x * 1e6, x * 1e6 @ w.T, w)
    change = torch.zeros_like(w)
    change[2, 3] = 1e-9
    expected = float((x[:, 3] * 1e6 * 1e-9).square().sum())
    assert objective.squared_error(w + change) == pytest.approx(expected, rel=1e-6)


def test_batches_add_up() -> None:
    x, t, w, b = data()
    parts = Objective.of(x[:7], t[:7], b) + Objective.of(x[7:], t[7:], b)
    assert parts.samples == 50
    assert parts.relative_error(w) == pytest.approx(Objective.of(x, t).relative_error(w))
    with pytest.raises(AssertionError, match="different weights"):
        _ = Objective.of(x, t, b) + Objective.of(x, t, w)


def test_rows_are_the_objective_of_some_outputs() -> None:
    x, t, w, b = data()
    some = Objective.of(x, t, b).rows(slice(2, 5))
    assert some.relative_error(w[2:5]) == pytest.approx(Objective.of(x, t[:, 2:5]).relative_error(w[2:5]))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blend_is_the_weighted_sum_of_both_errors(share: float) -> None:
    x, t, w, b = data()
    other_x, other_t, _, _ = data(1)
    first, second = Objective.of(x, t, b), Objective.of(other_x, other_t, b)
    blend = first.blended(second, share)
    expected = (1 - share) * first.squared_error(w) + share * second.squared_error(w)
    assert blend.squared_error(w) == pytest.approx(expected)
    assert blend.target_square == pytest.approx((1 - share) * first.target_square + share * second.target_square)


@pytest.mark.parametrize("based", [False, True])
def test_centred_objective_is_the_one_with_the_best_shift(based: bool) -> None:
    x, t, w, b = data()
    objective = Objective.of(x, t, b if based else None)
    best = objective.squared_error(w, best_shift(objective, w))
    centred = objective.centred()
    assert centred.squared_error(w) == pytest.approx(best)
    assert best <= objective.squared_error(w, best_shift(objective, w) + 0.01)
    by_hand = Objective.of(x - x.mean(0), t - t.mean(0), objective.base)
    torch.testing.assert_close(centred.gram, by_hand.gram)
    torch.testing.assert_close(centred.residual_cross, by_hand.residual_cross)
    torch.testing.assert_close(centred.target_squares, by_hand.target_squares)


def test_an_input_that_never_changes_is_dead_after_centring() -> None:
    x, t, w, b = data()
    x[:, 3], x[:, 5] = 1e4 / 3, 0.0
    objective = Objective.of(x, t, b)
    centred = objective.centred()
    assert (objective.live_inputs, centred.live_inputs) == (7, 6)
    for dead in (3, 5):
        assert not centred.gram[dead].any()
        assert not centred.gram[:, dead].any()
        assert not centred.residual_cross[:, dead].any()
    best = objective.squared_error(w, best_shift(objective, w))
    assert centred.squared_error(w) == pytest.approx(best)


def test_one_sample_leaves_nothing_to_fit_once_centred() -> None:
    x, t, w, b = data()
    centred = Objective.of(x[:1], t[:1], b).centred()
    assert centred.live_inputs == 0
    assert centred.mean_diagonal == 1
    assert centred.squared_error(w) == pytest.approx(0, abs=1e-12)


def test_perfect_fit_is_zero_not_negative() -> None:
    x, _, w, b = data()
    for base in (None, w, b):
        assert 0 <= Objective.of(x, x @ w.T, base).relative_error(w) < 1e-6


@pytest.mark.parametrize(("scale", "error"), [(0.0, 0.0), (1.0, 1.0)])
def test_error_of_a_silent_layer(scale: float, error: float) -> None:
    x, t, w, _ = data()
    assert Objective.of(x, t * 0).relative_error(w * scale) == error
