"""Which layers are chosen, and the reason that each of the others is given."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection, select

PATTERN = Pattern(2, 4, transposable=True)
EVERYTHING = Selection(keep_last=False)


def three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def test_all_but_the_last_by_default() -> None:
    choice = select(three(), PATTERN)
    assert choice.chosen == ("0", "1")
    assert choice.skipped == {"2": "last layer, kept dense (keep_last = true)"}
    assert select(three(), PATTERN, EVERYTHING).chosen == ("0", "1", "2")


def test_globs_include_and_exclude() -> None:
    model = nn.ModuleDict({"encoder": three(), "decoder": three()})
    choice = select(model, PATTERN, Selection(include=("encoder.*",), exclude=("*.1",)))
    assert choice.chosen == ("encoder.0", "encoder.2")
    assert choice.skipped["encoder.1"] == "excluded by *.1"
    assert choice.skipped["decoder.0"] == "not included by encoder.*"


class Subclassed(nn.Linear):
    """May use its weight in any way."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(6, 8), "6 inputs are not a multiple of 4"),
        (nn.Conv2d(3, 8, 3), "3 inputs are not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=2), "grouped convolution (2 groups)"),
        (Subclassed(8, 8), "a Subclassed"),
        (parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is computed from other parameters"),
        (prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "its weight is computed from other parameters"),
    ],
)
def test_a_layer_that_cannot_be_sparse_is_skipped_with_the_reason(layer: nn.Module, reason: str) -> None:
    choice = select(nn.Sequential(layer, nn.Linear(8, 8), nn.Linear(8, 2)), PATTERN)
    assert choice.chosen == ("1",)
    assert reason in choice.skipped["0"]


def test_outputs_need_not_be_a_multiple() -> None:
    assert select(nn.Linear(8, 10), PATTERN, EVERYTHING).chosen == ("",)


def test_the_projection_of_attention_is_skipped() -> None:
    """Attention reads out_proj.weight itself: a mask in the layer's forward would be ignored."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    choice = select(model, PATTERN, EVERYTHING)
    assert choice.chosen == ("linear1", "linear2")
    assert "NonDynamicallyQuantizableLinear" in choice.skipped["self_attn.out_proj"]


def test_a_weight_that_two_modules_share_stays_dense() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    choice = select(model, PATTERN, EVERYTHING)
    assert choice.chosen == ("c",)
    assert choice.skipped == {"a": "shares its weight with b", "b": "shares its weight with a"}


def test_a_weight_that_is_an_embedding_too_stays_dense() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(12, 8), "mix": nn.Linear(8, 8), "head": nn.Linear(8, 12)})
    model["head"].weight = model["words"].weight
    choice = select(model, PATTERN, EVERYTHING)
    assert choice.chosen == ("mix",)
    assert choice.skipped == {"head": "shares its weight with words"}


def test_one_layer_under_two_names_is_decided_once() -> None:
    layer = nn.Linear(8, 8)
    choice = select(nn.Sequential(layer, nn.ReLU(), layer), PATTERN, EVERYTHING)
    assert choice.chosen == ("0",)
    assert choice.skipped == {}


def test_nothing_left_is_an_error_that_lists_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"no layer can become 2:4-T: 0: 6 inputs .*; 1: last layer"):
        select(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), PATTERN)
    with pytest.raises(ValueError, match="no Linear or Conv2d layer"):
        select(nn.Sequential(nn.ReLU()), PATTERN)


def test_selecting_changes_nothing() -> None:
    model = three()
    before = copy.deepcopy(model.state_dict())
    select(model, PATTERN)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in model] == [nn.Linear] * 3
