"""Plans from data: predictions against definitions, the same for any number of workers, and what they leave alone."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.zoo import SMALL
from tnm_pipeline.training.convert.admm import admm
from tnm_pipeline.training.convert.batch import Batch, CalibrationError
from tnm_pipeline.training.convert.budget import Budget
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.convert.damping import Trial
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.plan import Plan, PlanError
from tnm_pipeline.training.convert.planning import plan
from tnm_pipeline.training.convert.problem import Problem
from tnm_pipeline.training.masks.prune import prune_unstructured
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.unlabelled import count_examples

ROW, BOTH, LOOSE = Pattern(2, 4), Pattern(2, 4, transposable=True), Pattern(3, 4)
ALL_LAYERS = Selection(keep_last=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))


BATCHES = list(drawn(60, 8).split(20))


def halves_of(pair: tuple[Objective, Objective]) -> tuple[Objective, Objective]:
    return pair


@pytest.mark.parametrize(("fitted", "tested"), [((0, 2), (1,)), ((0,), (0,))])
def test_predicted_errors_are_those_of_fitted_layers_on_other_batches(
    fitted: tuple[int, ...], tested: tuple[int, ...]
) -> None:
    model = network()
    batches = BATCHES[: max(fitted) + 1]
    made = plan(model, batches, [ROW, LOOSE], selection=ALL_LAYERS, choose="error", most_error=0.3)
    for index, layer in ((0, made.layers[0]), (2, made.layers[1]), (4, made.layers[2])):
        module = prunable_layer(model, str(index))
        old = module.weight.detach().double()
        parts = [model[:index](BATCHES[at]).double().detach() for at in fitted]
        x = torch.cat([model[:index](BATCHES[at]).double().detach() for at in tested])
        biased = module.bias is not None
        objectives = [Objective.of(part, part @ old.T, old) for part in parts]
        objective = objectives[0] if len(parts) == 1 else objectives[0] + objectives[1]
        for candidate in layer.candidates:
            if candidate.pattern is None:
                continue
            choose = None
            if len(parts) == 2:
                pair = objectives[0], objectives[1]
                choose = Trial(partial(halves_of, pair), old, candidate.pattern, "exact", centred=biased).best
            goal = objective.centred() if biased else objective
            problem = Problem(goal, old, candidate.pattern, choose_damping=choose)
            error = x @ (admm([problem], Group())[0].weight - old).T
            if biased:
                error = error - error.mean(0)
            assert candidate.predicted_error == pytest.approx(float(error.norm() / (x @ old.T).norm()), rel=1e-3)
        within = [c for c in layer.candidates if c.predicted_error is not None and c.predicted_error <= 0.3]
        assert layer.pattern == min((c.pattern for c in within if c.pattern), key=lambda p: p.density, default=None)


def test_a_budget_is_kept_and_effects_are_predicted() -> None:
    made = plan(network(), BATCHES, [ROW, BOTH], selection=ALL_LAYERS, choose="budget", budget=Budget(max_dense=0.5))
    total = sum(layer.work for layer in made.layers)
    dense = sum(layer.work for layer in made.layers if layer.pattern is None)
    assert 0 < dense <= 0.5 * total
    assert made.effect is not None
    assert made.effect > 0


def test_a_budget_counts_on_what_later_layers_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    def effects() -> list[float]:
        made = plan(network(), BATCHES, [ROW], selection=ALL_LAYERS, choose="budget", budget=Budget(max_dense=0.5))
        return [layer.candidates[0].effect or 0.0 for layer in made.layers]

    with_repairs = effects()
    monkeypatch.setattr("tnm_pipeline.training.convert.sensitivity.ABSORBED", 0.0)
    without = effects()
    assert with_repairs == pytest.approx(
        [effect * 0.94**later for effect, later in zip(without, (2, 1, 0), strict=True)]
    )
    assert min(without) > 0


@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_workers_makes_the_same_plan_and_leaves_the_model_alone(name: str) -> None:
    build, inputs = SMALL[name]
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    batches: list[Batch] = [inputs(6, seed) for seed in range(3)]
    settings: dict[str, Any] = {"choose": "budget", "budget": Budget(work=0.7), "seed": 1}
    one, several = (plan(model, batches, [BOTH, ROW], workers=workers, **settings) for workers in (1, 3))
    assert one == several
    assert all(candidate.effect is not None for layer in one.layers for candidate in layer.candidates)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Routed(nn.Module):
    """Its second layer gets only what the first one lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        chosen = x[:, 0] > 0
        y[chosen] += self.expert(y[chosen])
        return y


class Again(nn.Module):
    """Its first layer runs again after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(self.second(self.first(x)))
        return y


def test_layers_that_run_again_stand_where_the_conversion_meets_them() -> None:
    settings: dict[str, Any] = {"selection": ALL_LAYERS, "choose": "error", "most_error": 0.3}
    made = plan(Again(), BATCHES, [ROW], **settings)
    assert [layer.name for layer in made.layers] == ["second", "first"]


def test_a_batch_that_gives_a_layer_nothing_does_not_test_it() -> None:
    batches = [batch.clone() for batch in BATCHES]
    batches[1][:, 0] = -1  # the one that tests other layers
    settings: dict[str, Any] = {"selection": ALL_LAYERS, "choose": "error", "most_error": 0.3}
    first, expert = plan(Routed(), batches, [ROW], **settings).layers
    assert first.candidates[0].predicted_error
    assert expert.candidates[0].predicted_error


def test_zeros_of_an_unstructured_model_choose_without_any_pass() -> None:
    model = network()
    prune_unstructured(model, ("2",), 0.9)
    made = plan(model, BATCHES, [LOOSE, ROW], selection=ALL_LAYERS, choose="zeros", confidence=0.9)
    assert [str(layer.chosen) for layer in made.layers] == ["dense", "2:4", "dense"]


def test_errors_of_an_unstructured_model_are_against_its_reference() -> None:
    reference, model = network(), network()
    prune_unstructured(model, ("0", "2"), 0.5)
    settings: dict[str, Any] = {"selection": ALL_LAYERS, "choose": "error", "most_error": 9.0}
    alone = plan(model, BATCHES, [LOOSE], **settings)
    against = plan(model, BATCHES, [LOOSE], reference=reference, **settings)
    assert errors(against)[0] > errors(alone)[0]


def errors(made: Plan) -> list[float]:
    return [layer.chosen.predicted_error or 0.0 for layer in made.layers]


class Raises(nn.Module):
    """Fails on the second batch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) > 100:
            raise KeyError("inside")
        result: Tensor = self.net(x)
        return result


@pytest.mark.parametrize("bad", [0, 1])
def test_a_model_that_fails_says_so(bad: int) -> None:
    batches = [batch.clone() for batch in BATCHES]
    batches[bad][0, 0] = 1000
    with pytest.raises(CalibrationError, match="the model fails on the calibration data: KeyError: 'inside'"):
        plan(Raises(), batches, [ROW], choose="error", most_error=0.5, selection=ALL_LAYERS)


@pytest.mark.parametrize("choose", ["error", "budget"])
def test_what_a_way_of_choosing_needs(choose: Any) -> None:
    with pytest.raises(PlanError, match="needs"):
        plan(network(), BATCHES, [ROW], choose=choose, selection=ALL_LAYERS)


def test_a_sensitivity_looks_at_few_examples_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(*arguments: Any, **_: Any) -> None:
        seen.append(count_examples(arguments[3]))
        raise CalibrationError("enough")

    monkeypatch.setattr("tnm_pipeline.training.convert.planning.measure_sensitivity", measure)
    for sizes in ([10, 20], [100, 100, 100], [1] * 300, [7] * 50):
        batches = [drawn(size, 8) for size in sizes]
        with pytest.raises(CalibrationError, match="enough"):
            plan(network(), batches, [ROW], choose="budget", budget=Budget(work=0.9), selection=ALL_LAYERS)
    assert seen[0] == 30
    assert all(32 <= count <= 64 for count in seen[1:])
