"""Gram matrices in units in which every input has the same energy."""

import pytest
import torch

from tnm_pipeline.training.convert.unit_diagonal import unit_diagonal


@pytest.mark.parametrize("width", [1, 5, 256, 300])  # rows are scaled 256 at a time
@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
def test_it_is_the_damped_matrix_between_two_diagonal_ones(width: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = unit * torch.randn(40, width, generator=generator, dtype=torch.float64) + unit
    x[:, 0] = 0  # an input that is silent has the damping alone
    gram, ridge = x.T @ x, 0.1 * unit**2
    damped = gram + ridge * torch.eye(width, dtype=torch.float64)
    scale = torch.diag(damped.diagonal().rsqrt())
    found = unit_diagonal(gram, ridge)
    assert found.dtype == torch.float32
    assert torch.equal(found.diagonal(), torch.ones(width))
    torch.testing.assert_close(found, (scale @ damped @ scale).float(), rtol=1e-6, atol=1e-7)
