"""A small network and a plain loop that knows nothing of masks, for the tests of the Sparsifier."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tnm_pipeline.training.recipes import RECIPES, Recipe
from tnm_pipeline.training.selection import Selection

EVERYTHING = Selection(keep_last=False)
STATIC = Recipe("static")

# Scaled down to 8 steps: everything happens on the way.
PRESETS: dict[str, tuple[Recipe, str]] = {
    name: (replace(recipe, refresh_every=recipe.refresh_every and 2), "2:4" if recipe.soft_threshold else "2:4-T")
    for name, recipe in RECIPES.items()
}


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 4, 4, 4, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(count)]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for inputs, targets in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
