"""Methods against least squares row by row, and against each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert import METHODS
from tnm_pipeline.training.convert.adaprune import adaprune
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern


def layer(outputs: int = 12, inputs: int = 16, samples: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated X (samples, inputs), T with noise, W; float64."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mixing
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return x, x @ w.T + noise, w


def by_rows(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """The definition: one numpy.linalg.lstsq per row, on the columns that the row keeps."""
    solution = np.zeros(mask.shape)
    for row, kept in enumerate(mask.numpy()):
        solution[row, kept] = np.linalg.lstsq(x.numpy()[:, kept], t.numpy()[:, row])[0]
    return torch.from_numpy(solution)


@pytest.mark.parametrize("text", ["2:4", "2:4-T", "1:4"])
def test_least_squares_equals_lstsq_of_each_row(text: str) -> None:
    x, t, w = layer()
    mask = solve(w, Pattern.parse(text))
    solution = least_squares(Objective.of(x, t), w, mask, damping=1e-12)
    torch.testing.assert_close(solution.weight, by_rows(x, t, mask), rtol=1e-6, atol=1e-6)


def test_rows_may_keep_different_counts_even_none() -> None:
    x, t, w = layer()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[3] = False
    solution = least_squares(Objective.of(x, t), w, mask, damping=1e-12)
    torch.testing.assert_close(solution.weight, by_rows(x, t, mask), rtol=1e-6, atol=1e-6)


def test_chunks_do_not_change_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, w = layer()
    objective, mask = Objective.of(x, t), solve(w, Pattern(2, 4))
    whole = least_squares(objective, w, mask).weight
    monkeypatch.setattr("tnm_pipeline.training.convert.least_squares._ENTRIES_AT_ONCE", 5 * 8 * 8)
    torch.testing.assert_close(least_squares(objective, w, mask).weight, whole)


def test_closed_form_is_at_least_as_good_as_a_thousand_adam_steps() -> None:
    x, t, w = layer()
    objective, mask = Objective.of(x, t).centred(), solve(w, Pattern(2, 4, transposable=True))
    closed = least_squares(objective, w, mask, damping=1e-9).weight
    descended = adaprune(objective, w, mask).weight
    rounding = 1 + 1e-6  # descent runs in float32
    assert objective.squared_error(closed) <= objective.squared_error(descended) * rounding
    assert objective.squared_error(descended) < 0.9 * objective.squared_error(torch.where(mask, w, 0.0))
    assert not closed[~mask].any()
    assert not descended[~mask].any()


def test_inputs_never_seen_keep_their_weights() -> None:
    x, t, w = layer()
    x[:, :4] = 0
    mask = solve(w, Pattern(2, 4))
    solution = least_squares(Objective.of(x, t), w, mask)
    torch.testing.assert_close(solution.weight[:, :4], torch.where(mask, w, 0.0)[:, :4])


def test_fewer_samples_than_inputs_are_damped() -> None:
    x, t, w = layer(samples=5)
    mask = solve(w, Pattern(2, 4))
    solution = least_squares(Objective.of(x, t), w, mask)
    assert solution.damping > 0
    assert Objective.of(x, t).relative_error(solution.weight) < 1e-2  # 8 unknowns fit 5 samples


def test_damping_grows_until_the_systems_are_solvable() -> None:
    x, t, w = layer()
    objective = Objective.of(x, t)
    indefinite = replace(objective, gram=objective.gram - 0.005 * objective.mean_diagonal * torch.eye(16))
    mask = solve(w, Pattern(2, 4))
    indefinite.gram[0] = indefinite.gram[:, 0] = 0
    indefinite.gram[0, 0] = -0.005 * objective.mean_diagonal
    mask[0, :4] = torch.tensor([True, True, False, False])
    assert least_squares(indefinite, w, mask, damping=1e-4).damping == pytest.approx(1e-2)


def test_unsolvable_statistics_are_refused() -> None:
    x, t, w = layer()
    objective = Objective.of(x, t)
    broken = replace(objective, gram=objective.gram - 10 * objective.mean_diagonal * torch.eye(16))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        least_squares(broken, w, solve(w, Pattern(2, 4)))


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_weight_and_mask_stay_zero(method: str) -> None:
    x, t, w = layer()
    solution = METHODS[method](Objective.of(x, t), w * 0, torch.zeros_like(w, dtype=torch.bool))
    assert not solution.weight.any()
