"""Which layers are chosen, and the reason that each of the others is given."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import FOR_CONVERSION, Selection, SelectionError, select

PATTERN = Pattern(2, 4, transposable=True)
EVERYTHING = Selection(keep_last=False)
TIED = Selection(keep_last=False, tied=True)


def three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def coder() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": three(), "decoder": three()})


def test_all_but_the_last_by_default() -> None:
    choice = select(three(), PATTERN)
    assert choice.chosen == ("0", "1")
    assert choice.skipped == {"2": "registered last, kept dense (keep_last = true)"}
    assert select(three(), PATTERN, EVERYTHING).chosen == ("0", "1", "2")


def test_a_conversion_keeps_the_first_and_the_last() -> None:
    choice = select(three(), PATTERN, FOR_CONVERSION)
    assert choice.chosen == ("1",)
    assert choice.skipped["0"] == "registered first, kept dense (keep_first = true)"


@pytest.mark.parametrize("reader", [lambda: nn.Embedding(12, 8), lambda: nn.Conv1d(4, 8, 3)])
def test_the_layer_registered_first_may_stay_dense_by_its_type(reader: Callable[[], nn.Module]) -> None:
    """Then no other layer has to."""
    choice = select(nn.Sequential(nn.ReLU(), reader(), three()), PATTERN, FOR_CONVERSION)
    assert choice.chosen == ("2.0", "2.1")


def test_first_and_last_are_those_of_the_registration_whatever_runs_when() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.body(self.stem(x)))
            return result

    assert select(HeadFirst(), PATTERN, FOR_CONVERSION).skipped == {
        "head": "registered first, kept dense (keep_first = true)",
        "stem": "registered last, kept dense (keep_last = true)",
    }


def test_globs_include_and_exclude() -> None:
    choice = select(coder(), PATTERN, Selection(include=("encoder.*",), exclude=("*.1",)))
    assert choice.chosen == ("encoder.0", "encoder.2")
    assert choice.skipped["encoder.1"] == "excluded by *.1"
    assert choice.skipped["decoder.0"] == "not included by encoder.*"


def test_regular_expressions_are_searched_for() -> None:
    choice = select(coder(), PATTERN, Selection(include=(r"re:^\w+\.[02]$",), exclude=("re:^dec",), keep_last=False))
    assert choice.chosen == ("encoder.0", "encoder.2")
    assert choice.skipped["decoder.0"] == "excluded by re:^dec"


def test_types_include_and_exclude() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Embedding(3, 4))
    only = Selection(include=("type:Conv2d",), keep_last=False)
    assert select(model, PATTERN, only).chosen == ("0", "2")
    but = Selection(exclude=("type:Conv2d", "type:Embedding"), keep_last=False)
    assert select(model, PATTERN, but).chosen == ("1",)
    derived = nn.Sequential(Subclassed(8, 8), nn.Linear(8, 8))
    assert select(derived, PATTERN, Selection(exclude=("type:Subclassed",), keep_last=False)).chosen == ("1",)
    with pytest.raises(SelectionError, match="0: excluded by type:Linear; 1: excluded by type:Linear"):
        select(derived, PATTERN, Selection(exclude=("type:Linear",), keep_last=False))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Selection(exclude=("encodr.*",)), r"exclude rule 'encodr\.\*' matches no .*; the closest: encoder"),
        (Selection(exclude=("re:^encodder",)), r"exclude rule 're:\^encodder' matches no .*; the closest: encoder"),
        (Selection(exclude=("encoder",)), r"'encoder' matches no .* only what contains some: write 'encoder\.\*'"),
        (Selection(exclude=("type:Conv2d",)), r"'type:Conv2d' matches no .*; the closest: type:Linear"),
        (Selection(include=("type:Embedding", "*")), r"include rule 'type:Embedding' .* only words \(Embedding\)"),
        (Selection(exclude=("re:(",)), r"cannot read the rule 're:\(': .*missing \)"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_an_error(rules: Selection, words: str) -> None:
    model = coder()
    model["words"] = nn.Embedding(12, 8)
    with pytest.raises(SelectionError, match=words):
        select(model, PATTERN, rules)


def test_a_rule_that_matches_nothing_is_named_when_nothing_is_left() -> None:
    with pytest.raises(
        SelectionError, match=r"no layer can become 2:4-T: .*'9\*' matches no.*; 0: not included by 9\*"
    ):
        select(three(), PATTERN, Selection(include=("9*",)))


def test_what_stays_dense_anyway_may_be_excluded() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(12, 8), "mix": three()})
    assert select(model, PATTERN, Selection(exclude=("words",))).chosen == ("mix.0", "mix.1")


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


def test_subclasses_are_chosen_where_they_will_be_checked() -> None:
    model = nn.Sequential(Subclassed(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    choice = select(model, PATTERN, Selection(subclasses=True, exclude=("1.lin*",)))
    assert choice.chosen == ("0",)
    assert "NonDynamicallyQuantizableLinear" in choice.skipped["1.self_attn.out_proj"]


def test_a_quantized_weight_is_skipped() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    choice = select(nn.Sequential(layer, nn.Linear(8, 8)), PATTERN, EVERYTHING)
    assert choice.skipped["0"] == "its weight is torch.int8: quantized before it was made sparse"


def test_of_several_patterns_one_must_fit() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(6, 8), nn.Linear(8, 2))
    choice = select(model, (Pattern(4, 8), PATTERN))
    assert choice.chosen == ("0",)
    assert choice.skipped["1"].startswith("6 inputs are not a multiple of 8: no group of 4:8 fits; 6 inputs are not")
    with pytest.raises(SelectionError, match="no layer can become 4:8 or 2:8"):
        select(nn.Linear(12, 8), (Pattern(4, 8), Pattern(2, 8)), EVERYTHING)


def test_outputs_need_not_be_a_multiple() -> None:
    assert select(nn.Linear(8, 10), PATTERN, EVERYTHING).chosen == ("",)


def test_fused_attention_is_skipped_with_the_fix() -> None:
    """Attention reads out_proj.weight itself: a mask in the layer's forward would be ignored."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    choice = select(model, PATTERN, EVERYTHING)
    assert choice.chosen == ("linear1", "linear2")
    assert "NonDynamicallyQuantizableLinear" in choice.skipped["self_attn.out_proj"]
    assert "write the attention with Linear layers" in choice.skipped["self_attn.out_proj"]
    assert list(choice.unsupported) == ["self_attn"]
    assert "in_proj_weight" in choice.unsupported["self_attn"]


class LikeConv1D(nn.Module):
    """A product whose weight is laid out the other way round, as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))


def test_other_types_that_multiply_are_reported_and_those_that_do_not_are_not() -> None:
    model = nn.Sequential(
        nn.Conv1d(8, 8, 3), nn.LSTM(4, 4), nn.ConvTranspose2d(8, 8, 3), nn.Conv3d(8, 8, 3), LikeConv1D(),
        nn.Linear(8, 8), nn.Embedding(8, 8), nn.BatchNorm2d(8), nn.LayerNorm([8, 8]), nn.PReLU(8), nn.GroupNorm(2, 8),
        parametrizations.weight_norm(nn.Linear(8, 8)),
    )  # fmt: skip
    choice = select(model, PATTERN, EVERYTHING)
    assert choice.chosen == ("5",)
    assert list(choice.unsupported) == ["0", "1", "2", "3", "4"]
    assert choice.unsupported["4"].startswith("a LikeConv1D: only Linear and Conv2d become N:M")


def shared() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    return model


def test_a_weight_that_two_modules_share_stays_dense() -> None:
    choice = select(shared(), PATTERN, EVERYTHING)
    assert choice.chosen == ("c",)
    assert choice.skipped == {"a": "shares its weight with b", "b": "shares its weight with a"}


def test_a_conversion_may_choose_a_shared_weight_once() -> None:
    choice = select(shared(), PATTERN, TIED)
    assert choice.chosen == ("a", "c")
    assert choice.tied == {"a": ("b",)}
    assert choice.skipped == {}


@pytest.mark.parametrize(
    ("rules", "of_a", "of_b"),
    [
        ({"exclude": ("b",)}, "shares its weight with b; b is skipped: excluded by b", "excluded by b"),
        (
            {"include": ("a", "c")},
            "shares its weight with b; b is skipped: not included by a, c",
            "not included by a, c",
        ),
        ({"keep_first": True}, "registered first", "shares its weight with a; a is skipped: registered first"),
    ],
)
def test_all_layers_that_share_a_weight_must_be_allowed(rules: dict[str, object], of_a: str, of_b: str) -> None:
    choice = select(shared(), PATTERN, Selection(keep_last=False, tied=True, **rules))  # type: ignore[arg-type]
    assert choice.chosen == ("c",)
    assert choice.tied == {}
    assert choice.skipped["a"].startswith(of_a)
    assert choice.skipped["b"].startswith(of_b)


@pytest.mark.parametrize("rules", [EVERYTHING, TIED])
def test_a_weight_that_is_an_embedding_too_stays_dense(rules: Selection) -> None:
    model = nn.ModuleDict({"words": nn.Embedding(12, 8), "mix": nn.Linear(8, 8), "head": nn.Linear(8, 12)})
    model["head"].weight = model["words"].weight
    choice = select(model, PATTERN, rules)
    assert choice.chosen == ("mix",)
    assert choice.skipped["head"].startswith("shares its weight with words")


def test_one_layer_under_two_names_is_decided_once() -> None:
    layer = nn.Linear(8, 8)
    choice = select(nn.Sequential(layer, nn.ReLU(), layer), PATTERN, EVERYTHING)
    assert choice.chosen == ("0",)
    assert choice.skipped == {}


def test_nothing_left_is_an_error_that_lists_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"no layer can become 2:4-T: 0: 6 inputs .*; 1: registered last"):
        select(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), PATTERN)
    with pytest.raises(ValueError, match="no Linear or Conv2d layer"):
        select(nn.Sequential(nn.ReLU()), PATTERN)


def test_selecting_changes_nothing() -> None:
    model = three()
    before = copy.deepcopy(model.state_dict())
    select(model, PATTERN)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in model] == [nn.Linear] * 3
