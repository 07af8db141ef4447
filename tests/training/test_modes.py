"""Evaluation mode for a while."""

import pytest
from torch import nn

from tnm_pipeline.training.modes import evaluating


def test_evaluation_mode_ends_with_every_module_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    network[2].eval()
    before = [module.training for module in network.modules()]

    def fail_inside() -> None:
        with evaluating(network):
            assert not any(module.training for module in network.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [module.training for module in network.modules()] == before
