"""Which pattern each layer gets, why not another, and what a person reads of it."""

import json
from collections.abc import Sequence
from itertools import pairwise, product
from math import comb, sqrt

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.budget import Budget, BudgetError
from tnm_pipeline.training.convert.choosing import (
    Scene,
    plan_by_error,
    plan_by_preference,
    plan_by_zeros,
    plan_under_budget,
)
from tnm_pipeline.training.convert.estimate import Estimate
from tnm_pipeline.training.convert.plan import Candidate, Plan, PlanError
from tnm_pipeline.training.convert.sensitivity import Sensitivity
from tnm_pipeline.training.convert.work import measure_work
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice, Selection, select

ALL = Selection(keep_last=False, tied=True, subclasses=True)
TWO_FOUR, TRANSPOSED, FOUR_EIGHT, ONE_FOUR = (Pattern.parse(text) for text in ("2:4", "2:4-T", "4:8", "1:4"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene(model: nn.Module, batch: Tensor, patterns: Sequence[Pattern], selection: Selection = ALL) -> Scene:
    return Scene(model, select(model, patterns, selection), measure_work(model, batch), patterns)


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def why_not(plan: Plan) -> list[dict[str, str | None]]:
    return [{str(candidate): candidate.rejected for candidate in layer.candidates} for layer in plan.layers]


class Backwards(nn.Module):
    """Registers its layers in another order than they run, one never, and one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.idle, self.shared, self.first = (nn.Linear(8, 8) for _ in range(4))
        self.shared.weight = self.first.weight
        self.mix = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.shared(self.first(x))))  # type: ignore[no-any-return]


def test_layers_stand_in_the_order_of_execution_and_nothing_is_left_out() -> None:
    plan = plan_by_preference(scene(Backwards(), drawn(3, 4, 8), [TWO_FOUR]))
    assert [(layer.name, layer.tied, layer.work) for layer in plan.layers] == [
        ("shared", ("first",), 2 * 4 * 64),
        ("last", (), 4 * 64),
    ]
    assert [(layer.name, layer.type) for layer in plan.skipped] == [("mix", "Conv1d"), ("idle", "Linear")]
    assert plan.skipped[1].reason == "does not run on the first calibration batch"
    assert list(plan.patterns.items()) == [("shared", TWO_FOUR), ("last", TWO_FOUR)]


class Doubled(nn.Linear):
    """Computes something else than its weight says."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in the class it derives from
        return 2 * super().forward(input)


def test_a_derived_layer_that_computes_something_else_is_skipped() -> None:
    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    plan = plan_by_preference(scene(model, drawn(2, 8), [TWO_FOUR]))
    assert [layer.name for layer in plan.layers] == ["1"]
    assert plan.skipped[0].reason == "a Doubled: 0 does not compute what a plain layer would"
    with pytest.raises(PlanError, match="no layer is left to convert: 0: a Doubled"):
        plan_by_preference(scene(model[:1], drawn(2, 8), [TWO_FOUR]))


def test_the_first_pattern_that_fits() -> None:
    plan = plan_by_preference(scene(chain(8, 12, 4), drawn(2, 8), [FOUR_EIGHT, TRANSPOSED, TWO_FOUR]))
    assert [layer.pattern for layer in plan.layers] == [FOUR_EIGHT, TRANSPOSED]
    assert why_not(plan) == [
        {"4:8": None, "2:4-T": "4:8 comes first", "2:4": "4:8 comes first", "dense": "4:8 comes first"},
        {
            "4:8": "12 inputs are not a multiple of 8: no group of 4:8 fits",
            "2:4-T": None,
            "2:4": "2:4-T comes first",
            "dense": "2:4-T comes first",
        },
    ]


def unstructured(*shares_of_zeros: float) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in shares_of_zeros))
    for index, (layer, share) in enumerate(zip(model, shares_of_zeros, strict=True)):
        zeros = torch.rand(64, 64, generator=torch.Generator().manual_seed(index)) < share
        layer.weight = nn.Parameter(drawn(64, 64).masked_fill(zeros, 0.0))
    return model


def test_zeros_choose_the_most_of_them_that_almost_every_group_has() -> None:
    """The paper's rule: the largest k with P(at least k zeros of M) above the confidence."""
    shares = (0.0, 0.3, 0.5, 0.8, 0.93, 1.0)
    model = unstructured(*shares)
    plan = plan_by_zeros(scene(model, drawn(1, 64), [Pattern(n, 8) for n in range(1, 8)]), confidence=0.9)
    for layer, linear in zip(plan.layers, model, strict=True):
        zeros = float((linear.get_parameter("weight") == 0).double().mean())
        most = max(
            (k for k in range(1, 8) if sum(comb(8, i) * zeros**i * (1 - zeros) ** (8 - i) for i in range(k, 9)) >= 0.9),
            default=0,
        )
        assert layer.pattern == (Pattern(8 - most, 8) if most else None), zeros
    assert plan.layers[0].reason == "0.0% zeros: too few for any of the patterns"
    assert plan.layers[0].candidates[0].violation_probability == 1


def test_the_share_of_groups_that_violate_is_counted_both_ways() -> None:
    [layer] = plan_by_zeros(scene(unstructured(0.8), drawn(1, 64), [TRANSPOSED, TWO_FOUR]), confidence=0.95).layers
    broken = {False: 0, True: 0}
    model = unstructured(0.8)
    weight = model.get_parameter("0.weight")
    for matrix, transposed in ((weight, False), (weight.T, True)):
        for row in matrix:
            broken[transposed] += sum(int((group != 0).sum()) > 2 for group in row.split(4))
    by_name = {str(candidate): candidate for candidate in layer.candidates}
    assert by_name["2:4"].violating == broken[False] / 1024
    assert by_name["2:4-T"].violating == (broken[False] + broken[True]) / 2048
    assert by_name["2:4"].violation_probability == pytest.approx(0.0272, abs=0.01)
    assert layer.pattern == TRANSPOSED
    assert by_name["2:4"].rejected == "2:4-T will do and is listed first"


def test_zeros_say_why_not() -> None:
    model = unstructured(0.5)
    [layer] = plan_by_zeros(scene(model, drawn(1, 64), [ONE_FOUR, TWO_FOUR, Pattern(3, 4)]), confidence=0.9).layers
    assert layer.pattern == Pattern(3, 4)
    assert [candidate.rejected for candidate in layer.candidates] == [
        f"{layer.candidates[0].violation_probability:.1%} of groups expected to violate it, more than 10.0%",
        f"{layer.candidates[1].violation_probability:.1%} of groups expected to violate it, more than 10.0%",
        None,
        "3:4 loses almost nothing",
    ]
    assert layer.reason == "50.7% zeros: 5.9% of groups expected to violate it, 6.1% do"
    with pytest.raises(PlanError, match=r"confidence is a probability, such as 0\.95; got 95"):
        plan_by_zeros(scene(model, drawn(1, 64), [TWO_FOUR]), confidence=95)


ERRORS = {
    ("0", "2:4-T"): 0.31,
    ("0", "2:4"): 0.24,
    ("1", "2:4-T"): 0.2,
    ("1", "2:4"): 0.1,
    ("2", "2:4-T"): 0.5,
    ("2", "2:4"): 0.4,
}


def told(name: str, pattern: Pattern) -> Estimate:
    """As if the layers were those of a table."""
    error = ERRORS.get((name, str(pattern)), 0.6)
    return Estimate(error, torch.full((2,), error**2, dtype=torch.float64))


def test_errors_choose_the_sparsest_that_is_close_enough() -> None:
    plan = plan_by_error(scene(chain(8, 8, 8, 8), drawn(1, 8), [TRANSPOSED, TWO_FOUR, ONE_FOUR]), told, 0.25)
    assert [layer.pattern for layer in plan.layers] == [TWO_FOUR, TRANSPOSED, None]
    assert why_not(plan) == [
        {
            "1:4": "predicted error 0.600 > 0.25",
            "2:4-T": "predicted error 0.310 > 0.25",
            "2:4": None,
            "dense": "2:4 is within the limit",
        },
        {
            "1:4": "predicted error 0.600 > 0.25",
            "2:4-T": None,
            "2:4": "2:4-T will do and is listed first",
            "dense": "2:4-T is within the limit",
        },
        {
            "1:4": "predicted error 0.600 > 0.25",
            "2:4-T": "predicted error 0.500 > 0.25",
            "2:4": "predicted error 0.400 > 0.25",
            "dense": None,
        },
    ]
    wide = plan_by_error(scene(chain(8, 8), drawn(1, 8), [TWO_FOUR, ONE_FOUR]), told, 0.7)
    assert why_not(wide) == [{"1:4": None, "2:4": "1:4 is sparser and will do", "dense": "1:4 is within the limit"}]
    with pytest.raises(PlanError, match=r"such as 0\.25; got 0"):
        plan_by_error(scene(chain(8, 8), drawn(1, 8), [TWO_FOUR]), told, 0)


WEIGHTS = (1.0, 3.0, 0.2, 0.6)


def sensitive() -> dict[str, Sensitivity]:
    return {
        str(index): Sensitivity(torch.full((2,), weight, dtype=torch.float64), 0.5, "nothing")
        for index, weight in enumerate(WEIGHTS)
    }


@pytest.mark.parametrize("budget", [Budget(max_dense=0.4), Budget(max_dense=0.0), Budget(work=0.55), Budget(work=1.0)])
def test_a_budget_is_kept_at_the_least_effect(budget: Budget) -> None:
    patterns = [TRANSPOSED, TWO_FOUR, ONE_FOUR]
    plan = plan_under_budget(scene(chain(8, 24, 16, 8, 16), drawn(1, 8), patterns), told, sensitive(), budget)
    total = sum(layer.work for layer in plan.layers)
    options: list[Pattern | None] = [*patterns, None]

    def effect(index: int, pattern: Pattern | None) -> float:
        return 0.0 if pattern is None else WEIGHTS[index] * told(str(index), pattern).relative_error ** 2

    def spent(picks: Sequence[Pattern | None]) -> float:
        layers = zip(plan.layers, picks, strict=True)
        if budget.max_dense is not None:
            return sum(layer.work for layer, pick in layers if pick is None) / total
        return sum(layer.work * (pick.density if pick else 1) for layer, pick in layers) / total

    kept = [picks for picks in product(options, repeat=4) if spent(picks) <= budget.share]
    least = min(sum(effect(index, pick) for index, pick in enumerate(picks)) for picks in kept)
    assert spent([layer.pattern for layer in plan.layers]) <= budget.share
    assert plan.effect == pytest.approx(least)


def test_a_budget_says_what_the_alternatives_would_have_meant() -> None:
    plan = plan_under_budget(scene(chain(8, 8, 8), drawn(1, 8), [TWO_FOUR]), told, sensitive(), Budget(max_dense=0.5))
    assert [layer.reason for layer in plan.layers] == [
        "would have an effect of 0.058 on 50.0% of the work",
        "effect 0.03 on 50.0% of the work",
    ]
    assert why_not(plan) == [
        {"2:4": "effect 0.058", "dense": None},
        {"2:4": None, "dense": "effect 0, but the budget does more elsewhere"},
    ]
    with pytest.raises(
        BudgetError, match=r"the sparsest patterns leave 50\.0% of the work, and work = 0\.1 allows less"
    ):
        plan_under_budget(scene(chain(8, 8, 8), drawn(1, 8), [TWO_FOUR]), told, sensitive(), Budget(work=0.1))
    broken = {name: Sensitivity(one.per_output * float("nan"), 1.0, "nothing") for name, one in sensitive().items()}
    with pytest.raises(PlanError, match="layer 0 at 2:4 has a predicted effect of nan"):
        plan_under_budget(scene(chain(8, 8), drawn(1, 8), [TWO_FOUR]), told, broken, Budget(work=0.5))


def test_the_table_and_the_summary() -> None:
    model = nn.Sequential(chain(8, 8, 8), nn.Linear(6, 8))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    scenery = Scene(model, select(model, TWO_FOUR, ALL), measure_work(model, drawn(1, 8)), [TWO_FOUR])
    sensitivities = {f"0.{name}": one for name, one in sensitive().items()}
    plan = plan_under_budget(scenery, lambda name, p: told(name[-1], p), sensitivities, Budget(max_dense=0.5))
    rows = plan.rows()
    assert len({tuple(row) for row in rows}) == 1
    assert rows[1] | {"kept": "?"} == {
        "layer": "0.1",
        "type": "Linear",
        "matrix": "8 x 8",
        "work": "50.0%",
        "pattern": "2:4",
        "kept": "?",
        "predicted error": "0.100",
        "effect": "0.03",
        "why": "effect 0.03 on 50.0% of the work",
        "why not": "dense: effect 0, but the budget does more elsewhere",
    }
    assert rows[2]["why"] == "6 inputs are not a multiple of 4: no group of 2:4 fits"
    assert plan.summary() == (
        "2 layers (least effect, max_dense = 0.5): 1 2:4, 1 dense; 1 skipped; 75% of the multiply-adds remain; "
        f"predicted change of the output: {sqrt(0.03):.2f}"
    )
    assert plan_by_preference(scenery).summary() == (
        "2 layers (first pattern that fits): 2 2:4; 1 skipped; 50% of the multiply-adds remain"
    )


def test_it_goes_into_json() -> None:
    plan = plan_by_preference(scene(Backwards(), drawn(3, 4, 8), [TWO_FOUR]))
    read = json.loads(json.dumps(plan.to_dict()))
    assert [layer["pattern"] for layer in read["layers"]] == ["2:4", "2:4"]
    assert [candidate["pattern"] for candidate in read["layers"][0]["candidates"]] == ["2:4", "dense"]
    assert read["work_left"] == plan.work / 2


def test_the_order_of_settling_keeps_earlier_reasons() -> None:
    [layer] = plan_by_preference(scene(chain(8, 8), drawn(1, 8), [TWO_FOUR])).layers
    assert layer.chosen == Candidate(TWO_FOUR, kept_magnitude=layer.chosen.kept_magnitude)
    assert 0.5 < (layer.chosen.kept_magnitude or 0) < 1


def test_a_choice_of_nothing_that_runs_is_an_error() -> None:
    model = Backwards()
    with pytest.raises(PlanError, match="idle: does not run on the first calibration batch"):
        plan_by_preference(Scene(model, Choice(("idle",)), measure_work(model, drawn(1, 4, 8)), [TWO_FOUR]))
