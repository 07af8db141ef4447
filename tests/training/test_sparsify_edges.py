"""Frozen and tied weights, and arguments that cannot be meant."""

import pytest
import torch
from torch import nn

from tests.training.loops import EVERYTHING, batches, sgd, small_net, train
from tnm_pipeline.training.layers import SparseLinear
from tnm_pipeline.training.pattern import PatternError
from tnm_pipeline.training.recipes import Recipe, RecipeError
from tnm_pipeline.training.selection import Selection, SelectionError
from tnm_pipeline.training.sparsify import Sparsifier


def test_a_frozen_layer_has_a_mask_that_stays() -> None:
    model = small_net()
    model.get_parameter("0.weight").requires_grad_(False)
    before = model.get_parameter("0.weight").clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # as people do
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=1, decay=0.1))
    mask = sparsifier.masks()["0"].clone()
    train(model, optimizer, 4)
    assert sparsifier.telemetry[-1].flip_rate > 0  # of the other layer
    assert torch.equal(model.get_parameter("0.weight"), before)
    assert torch.equal(sparsifier.masks()["0"], mask)
    inputs = batches(1)[0][0]
    expected = model(inputs)
    rows, _ = sparsifier.finalize()
    assert rows[0].pattern == "2:4-T"
    assert torch.equal(model.get_parameter("0.weight"), before * mask)
    assert torch.equal(model(inputs), expected)


def test_a_tied_weight_stays_dense_and_computes_the_same_after_finalize() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = model[2].weight
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", selection=EVERYTHING)
    inputs = torch.ones(1, 8)
    before = model(inputs)
    rows, _ = sparsifier.finalize()
    assert torch.equal(model(inputs), before)
    assert [row.skipped for row in rows] == ["shares its weight with 2", None, "shares its weight with 0"]


def test_only_tied_weights_are_too_few() -> None:
    """As the only large weight of a small language model, which reads and writes words with one table."""
    table = nn.Embedding(16, 8)
    models = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Sequential(table, nn.Linear(8, 16, bias=False))]
    models[0][1].weight = models[0][0].weight
    models[1][1].weight = table.weight
    for model in models:
        with pytest.raises(SelectionError, match=r"no layer can become 2:4-T: .*shares its weight with 0"):
            Sparsifier(model, sgd(model), "2:4-T", selection=EVERYTHING)


def test_a_pattern_that_no_layer_admits_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(10, 8))
    with pytest.raises(SelectionError, match=r"no layer can become 2:4: 0: 6 inputs are not a multiple of 4.*; 1: 10"):
        Sparsifier(model, sgd(model), "2:4", selection=EVERYTHING)


def test_a_mask_period_of_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a mask period of 0 \(refresh_every\): .* give 1 or more, or None"):
        Recipe("mine", refresh_every=0)


def test_bad_arguments_leave_the_model_as_it_was() -> None:
    model = small_net()
    optimizer = sgd(model)
    with pytest.raises(PatternError, match="5:4"):
        Sparsifier(model, optimizer, "5:4")
    with pytest.raises(RecipeError, match="unknown recipe"):
        Sparsifier(model, optimizer, "2:4", "magic")
    with pytest.raises(RecipeError, match="s-ste is forward only"):
        Sparsifier(model, optimizer, "2:4-T", "s-ste")
    for recipe in ("gradual", "dense-tail"):
        with pytest.raises(RecipeError, match=f"{recipe} .*: pass total_steps"):
            Sparsifier(model, optimizer, "2:4-T", recipe)
    with pytest.raises(RecipeError, match="total_steps is 0"):
        Sparsifier(model, optimizer, "2:4-T", total_steps=0)
    with pytest.raises(ValueError, match="no layer can become"):
        Sparsifier(model, optimizer, "2:4", selection=Selection(include=("nothing",)))
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 3: .*NaN or Inf"):
        Sparsifier(model, optimizer, "2:4")
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert list(model.state_dict()) == list(small_net().state_dict())
