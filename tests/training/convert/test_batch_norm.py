"""Re-tuned statistics against the same ones computed by hand."""

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch_norm import retune_batch_norm


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 3, 5, 5, generator=generator) * 3 + 1 for _ in range(4)]


@torch.no_grad()
def test_statistics_are_the_averages_over_the_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=0.3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9), norm, nn.ReLU())
    norm.running_mean = torch.full((4,), 7.0)
    assert retune_batch_norm(model, batches()) == 1
    maps = [model[0](x).transpose(0, 1).flatten(1) for x in batches()]  # dropout must not act
    torch.testing.assert_close(norm.running_mean, torch.stack([m.mean(1) for m in maps]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([m.var(1) for m in maps]).mean(0))
    assert norm.momentum == 0.3
    assert model.training
    assert norm.training


@torch.no_grad()
def test_only_norms_that_keep_statistics_and_run_are_touched() -> None:
    idle = nn.BatchNorm2d(3)
    idle.running_mean = torch.ones(3)
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(5)).eval()
    model[1].register_module("idle", idle)
    assert retune_batch_norm(model, batches()) == 0
    torch.testing.assert_close(idle.running_mean, torch.ones(3))
    assert not model.training
