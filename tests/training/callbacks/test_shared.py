"""The learning rate that a recipe asks for, under the schedulers of torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tnm_pipeline.training.callbacks.shared import Sparsifying
from tnm_pipeline.training.recipes import Recipe

STEPS = 12
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 4),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.01),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, eta_min=0.01),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=STEPS + 1),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=4),
    "warmup, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        [3],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


def rates(build: Callable[[torch.optim.Optimizer], Any], scale: float) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = build(optimizer)
    callback = Sparsifying("2:4", Recipe("mine", lr_scale=scale))
    callback.begin(model, optimizer, [schedule], STEPS, None)
    seen = []
    for _ in range(STEPS):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_has_the_scaled_rate(name: str) -> None:
    plain = rates(SCHEDULERS[name], 1.0)
    assert len(set(plain)) > 1
    assert rates(SCHEDULERS[name], 2.0) == pytest.approx([2 * rate for rate in plain])
