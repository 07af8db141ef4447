"""Memory that is foretold, against the tensors that conversions really hold."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import ALL, mlp, vectors
from tnm_pipeline.training.convert import batch as batches_module
from tnm_pipeline.training.convert import convert, passes, plan_for
from tnm_pipeline.training.convert.memory import Alive, estimate_memory
from tnm_pipeline.training.pattern import Pattern

ROW = Pattern(2, 4)


def drawn(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


def wide() -> nn.Sequential:
    """Sums of its second layer, K = 512, outweigh all else."""
    return nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 64), nn.Linear(64, 8))


def square() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(384, 384) for _ in range(3)))


def images() -> nn.Sequential:
    """Activations outweigh all else."""
    first = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def tokens() -> nn.Sequential:
    """Many rows of few columns."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[Tensor]]] = {
    "wide": (wide, drawn(4, 64, 16)),
    "square": (square, drawn(4, 64, 384)),
    "images": (images, drawn(4, 16, 4, 32, 32)),
    "tokens": (tokens, drawn(6, 32, 64, 64)),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_is_alive_at_the_peak(
    name: str, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, batches = CASES[name]
    model = build().eval()
    planned = plan_for(model, ROW, batches[0], ALL)
    foretold = estimate_memory(model, planned, batches, sequential=sequential)
    alive = Alive()

    def forward(model: nn.Module, batch: Any) -> object:
        with alive:  # a mode is a thread's own, and passes have theirs
            return batches_module.forward(model, batch)

    monkeypatch.setattr(passes, "forward", forward)
    with alive:
        convert(model, planned, batches, sequential=sequential, reorder_channels=False)
    assert alive.peak <= foretold.total <= 1.2 * alive.peak


def test_what_is_counted_is_alive_and_was_made_inside() -> None:
    given = torch.ones(100)
    with Alive() as alive:
        made = given + 1
        view = made[:50]
        del made
        assert alive.bytes == 400
        view += 1
        given.mul_(2)
        assert alive.bytes == 400
        del view
        assert (alive.bytes, alive.peak) == (0, 400)


def test_parts_of_the_estimate() -> None:
    model, batches = mlp(), vectors()
    planned = plan_for(model, ROW, batches[0], ALL)
    once, twice = (estimate_memory(model, planned, batches * times) for times in (10, 20))
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.01)
    assert once.copies == 16 * 24 + 24 * 24 + 24 * 8
    assert once.total == once.activations + once.copies + once.sums
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    for renumbered, copies in ((False, 1), (True, 2)):
        held = estimate_memory(model, planned, batches, reference=mlp(), reorder_channels=renumbered)
        assert held.copies == once.copies + copies * parameters
