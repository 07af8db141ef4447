"""A training with packed weights, on emulated operators, against the masked one."""

import copy

import pytest
import torch
from torch import nn

from tests.training.kernels.emulation import Emulation
from tnm_pipeline.training import backend as backends
from tnm_pipeline.training.backend import Backend, BackendError
from tnm_pipeline.training.recipes import recipe_named
from tnm_pipeline.training.sparsify import Sparsifier

STEPS, MICRO_BATCHES = 12, 2


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated operators need no GPU."""
    monkeypatch.setattr(backends, "why_never", lambda weight, pattern: None)
    monkeypatch.setattr(backends, "why_not_now", lambda weight, dtype: None)


def _train(backend: Backend, recipe: str) -> tuple[nn.Sequential, Sparsifier, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(
        model, optimizer, "2:4-T", recipe, total_steps=STEPS, backend=backend, micro_batches=MICRO_BATCHES
    )
    losses = []
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            inputs = torch.randn(16, 32)
            targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(inputs).float(), targets)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return model, sparsifier, losses


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("recipe", ["dynamic", "gradual", "dense-tail", "static"])
def test_a_training_with_packed_weights_follows_the_masked_one(emulation: Emulation, recipe: str) -> None:
    _, _, masked = _train("masked", recipe)
    assert emulation.products == 0
    model, sparsifier, packed = _train("sparse", recipe)
    assert emulation.products > 0
    assert [row.chosen for row in sparsifier.packs.table()] == ["sparse", "sparse"]
    assert packed == pytest.approx(masked, abs=0.05)

    twin = copy.deepcopy(model)
    assert model.state_dict().keys() == _train("masked", recipe)[0].state_dict().keys()
    sparsifier.finalize(twin)
    sparsifier.finalize()
    assert type(model[0]) is nn.Linear
    assert "packed" not in vars(model[0])
    assert torch.equal(model[0].get_parameter("weight"), twin[0].get_parameter("weight"))


def test_without_a_gpu_auto_is_masked_bit_for_bit_and_says_why() -> None:
    _, sparsifier, automatic = _train("auto", "dynamic")
    assert automatic == _train("masked", "dynamic")[2]
    assert {row.why for row in sparsifier.packs.table()} == {"no CUDA device"}


def test_products_of_their_own_are_not_packed() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    row = Sparsifier(model, optimizer, "2:4", recipe_named("s-ste"), backend="auto").packs.table()[0]
    assert (row.chosen, row.why) == ("masked", "recipe s-ste multiplies with weights that a soft threshold shrinks")


def test_an_unknown_backend_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BackendError, match="unknown backend 'fast': choose one of auto, masked, sparse"):
        Sparsifier(model, optimizer, "2:4", backend="fast")  # type: ignore[arg-type]  # on purpose
    assert type(model[0]) is nn.Linear
