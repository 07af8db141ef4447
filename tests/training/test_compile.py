"""torch.compile: one graph, compiled once, with the results of the eager model, in every recipe."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.loops import PRESETS, batches, sgd, small_net
from tnm_pipeline.training.sparsify import Sparsifier

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing


def learned(name: str, backend: str | None, **changes: Any) -> list[Tensor]:
    """All parameters after 9 steps with several mask updates; compiled only before the first, if at all."""
    recipe, pattern = PRESETS[name]
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, pattern, replace(recipe, **changes), total_steps=9)
    if backend:
        torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend=backend) if backend else model
    leaks = set()
    torch.manual_seed(0)
    for step, (inputs, targets) in enumerate(batches(9)):
        leaks.add(sparsifier.leak)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(inputs), targets).backward()
        optimizer.step()
    assert len(sparsifier.telemetry) >= 2 or name == "static"
    assert len(leaks) > 1 or not recipe.leaks
    return [parameter.detach() for parameter in model.parameters()]


def assert_alike(name: str, backend: str, **changes: Any) -> None:
    for found, expected in zip(learned(name, backend, **changes), learned(name, None, **changes), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_model_whose_masks_and_leak_change_is_compiled_once() -> None:
    assert_alike("gradual", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"gradual"}))
def test_every_recipe_is_compiled_once(name: str) -> None:
    assert_alike(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradual", "s-ste"])
def test_sampled_gradients_are_compiled_once(name: str) -> None:
    assert_alike(name, "aot_eager", sampled_gradient=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # likewise
@pytest.mark.parametrize("name", ["gradual", "s-ste"])
def test_generated_code_learns_the_same(name: str) -> None:
    """The default backend, which writes kernels of its own."""
    assert_alike(name, "inductor")
