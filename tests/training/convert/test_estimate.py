"""Predicted errors against those of the changed layer on its inputs, computed in loops."""

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.estimate import estimate_masked, estimate_weight
from tnm_pipeline.training.convert.meter import Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_estimate_of_a_mask_is_the_error_that_it_makes() -> None:
    inputs, layer = drawn(40, 8) + 1, nn.Linear(8, 4)
    base = layer.weight.detach().double()
    objective = Objective.of(inputs, inputs.double() @ base.T, base)
    repairs: list[Repair] = ["nothing", "shift"]
    for repair in repairs:
        relative, squared = estimate_masked(objective, layer.weight.detach(), TWO_FOUR, repair)
        best = []
        for row in base:
            kept = torch.zeros(8, dtype=torch.bool)
            for start in (0, 4):
                scores = row.abs() * inputs.double().square().sum(0).sqrt()
                kept[start + scores[start : start + 4].topk(2).indices] = True
            errors = inputs.double() @ torch.where(kept, 0.0, -row)
            errors = errors - errors.mean() if repair == "shift" else errors
            best.append(float(errors.square().mean()))
        torch.testing.assert_close(squared, torch.tensor(best, dtype=torch.float64))
        total = (inputs.double() @ base.T).square().sum() / 40
        assert relative == pytest.approx(float((squared.sum() / total).sqrt()))


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
