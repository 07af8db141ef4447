"""fit(): it learns, it stops, it goes on bit for bit, and it notices divergence."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.fitting import FitConfigError
from tnm_pipeline.training.loop import (
    FitConfig,
    FitResult,
    SparseTraining,
    TrainingDivergedError,
    TrainingStoppedError,
    fit,
)
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe
from tnm_pipeline.training.scoring import evaluate
from tnm_pipeline.training.sources import Splits, digits, digits_cnn, digits_mlp

# 230 samples: 7 steps an epoch, 6 samples left out of each; 28 steps in all; masks change at 3, 6, 9, ... 18
CONFIG = FitConfig(epochs=4, batch_size=32, save_every=5)
BOTH_WAYS = Pattern(2, 4, transposable=True)
DYNAMIC = SparseTraining(BOTH_WAYS, Recipe("mine", 3, decay=5e-3, freeze_at=0.7, lr_scale=2.0))
FADING = SparseTraining(BOTH_WAYS, Recipe("mine", 3, decay=2e-3, freeze_at=0.7, ramp=(0.1, 0.6), dense_from=0.9))
SOFT = SparseTraining(Pattern(2, 4), Recipe("mine", 3, freeze_at=0.7, soft_threshold=True, sampled_gradient=True))


def few() -> Splits:
    data = digits()
    return Splits(TensorDataset(*data.train[:230]), TensorDataset(*data.test[:100]))


def net() -> nn.Module:
    """With batch norm and dropout: buffers and random numbers must come back too."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36, 8),
        nn.Linear(8, 10),
    )


@dataclass(frozen=True)
class Outcome:
    result: FitResult
    weights: dict[str, Tensor]

    def assert_same(self, other: "Outcome") -> None:
        assert self.weights.keys() == other.weights.keys()
        assert all(torch.equal(self.weights[name], other.weights[name]) for name in self.weights)
        assert self.result.masks.keys() == other.result.masks.keys()
        assert all(torch.equal(mask, other.result.masks[name]) for name, mask in self.result.masks.items())
        assert self.result.history == other.result.history
        assert self.result.layers == other.result.layers
        assert self.result.accuracy == other.result.accuracy


def run(sparsity: SparseTraining | None, state: Path | None = None, stop_at: int | None = None) -> Outcome:
    model, steps = net(), [0]

    def on_step(done: int, _: int) -> None:
        steps[0] = done

    def should_stop() -> bool:
        return steps[0] == stop_at

    result = fit(model, few(), CONFIG, sparsity=sparsity, state_path=state, on_step=on_step, should_stop=should_stop)
    return Outcome(result, model.state_dict())


@pytest.fixture(scope="module", params=[None, DYNAMIC, FADING, SOFT], ids=["dense", "dynamic", "fading", "soft"])
def sparsity(request: pytest.FixtureRequest) -> SparseTraining | None:
    chosen: SparseTraining | None = request.param
    return chosen


@pytest.fixture(scope="module")
def uninterrupted(sparsity: SparseTraining | None) -> Outcome:
    return run(sparsity)


@pytest.mark.parametrize("stop_at", [10, 14, 18, 28], ids=["mid-epoch", "epoch end", "at a refresh", "last step"])
def test_a_stopped_training_goes_on_bit_for_bit(
    tmp_path: Path, sparsity: SparseTraining | None, uninterrupted: Outcome, stop_at: int
) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError, match=f"stopped after step {stop_at} of 28"):
        run(sparsity, state, stop_at)
    torch.manual_seed(12345)  # another process would have other generators
    run(sparsity, state).assert_same(uninterrupted)


def test_stopping_twice_is_no_different(
    tmp_path: Path, sparsity: SparseTraining | None, uninterrupted: Outcome
) -> None:
    state = tmp_path / "state.safetensors"
    for stop_at in (4, 16):
        with pytest.raises(TrainingStoppedError):
            run(sparsity, state, stop_at)
    run(sparsity, state).assert_same(uninterrupted)


def test_saving_changes_nothing(tmp_path: Path, sparsity: SparseTraining | None, uninterrupted: Outcome) -> None:
    run(sparsity, tmp_path / "state.safetensors").assert_same(uninterrupted)


@pytest.mark.parametrize("then", [SparseTraining(Pattern(2, 4), Recipe("mine")), None], ids=["denser", "dense"])
def test_the_state_of_another_training_is_refused(tmp_path: Path, then: SparseTraining | None) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError):
        run(SparseTraining(Pattern(1, 4), Recipe("mine")), state, 5)
    with pytest.raises(CheckpointError, match=r"saved while training with pattern 1:4, .* delete it to start over"):
        run(then, state)


def be_killed(state: Path) -> None:
    """Train, and die at step 13 without a word: between two state files, in the middle of an epoch."""

    def on_step(done: int, _: int) -> None:
        if done == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(net(), few(), CONFIG, sparsity=DYNAMIC, state_path=state, on_step=on_step)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    script = "import runpy, sys; from pathlib import Path; runpy.run_path(sys.argv[1])['be_killed'](Path(sys.argv[2]))"
    process = subprocess.run([sys.executable, "-c", script, __file__, state], check=False)
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    run(DYNAMIC, state).assert_same(run(DYNAMIC))


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(
    uninterrupted: Outcome, sparsity: SparseTraining | None
) -> None:
    run(sparsity).assert_same(uninterrupted)
    model = net()
    fit(model, few(), FitConfig(epochs=4, batch_size=32, seed=1), sparsity=sparsity)
    assert not torch.equal(model.state_dict()["4.weight"], uninterrupted.weights["4.weight"])


def test_curves_and_steps(uninterrupted: Outcome, sparsity: SparseTraining | None) -> None:
    history = uninterrupted.result.history
    assert [step for step, _ in history.loss] == [step for step, _ in history.score] == [7, 14, 21, 28]
    assert history.loss[-1][1] < history.loss[0][1]
    assert [step for step, _ in history.flip_rate] == ([3, 6, 9, 12, 15, 18] if sparsity else [])
    sparse = [] if sparsity is None or sparsity.recipe.ends_dense else [str(sparsity.pattern)]
    assert [row.pattern for row in uninterrupted.result.layers if row.pattern] == sparse
    assert len(uninterrupted.result.layers) == (3 if sparsity else 0)


@pytest.mark.parametrize(
    ("build", "recipe"),
    [(digits_mlp, None), *((digits_mlp, recipe) for recipe in RECIPES), (digits_cnn, "dynamic")],
)
def test_digits_are_learned(build: Callable[[], nn.Module], recipe: str | None) -> None:
    torch.manual_seed(0)
    model = build()
    pattern = SOFT.pattern if recipe == "s-ste" else BOTH_WAYS
    result = fit(
        model, digits(), FitConfig(epochs=5), sparsity=SparseTraining(pattern, RECIPES[recipe]) if recipe else None
    )
    assert result.accuracy > 0.7  # chance is 0.1
    assert not model.training
    assert evaluate(model, digits().test) == result.accuracy
    ends_dense = recipe is not None and RECIPES[recipe].ends_dense
    assert [row.violations for row in result.layers if row.pattern] == [0] * len(result.masks)
    assert bool(result.masks) == (recipe is not None and not ends_dense)
    assert all(type(module).__module__.startswith("torch.nn") for module in model.modules())


class Overflows(nn.Module):
    """A loss that is finite while its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        nn.init.zeros_(self.linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(inputs.flatten(1))
        return (logits - self.linear.bias).abs().sqrt()  # the slope of sqrt at 0 is infinite


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    data = few()
    data.train.tensors[0][150] = 3e38  # seen once in every epoch
    model = digits_mlp()
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ of 28: lower train.lr \(now 0.1\)"):
        fit(model, data, FitConfig(epochs=4, batch_size=32, save_every=1, warmup=0.0), state_path=state)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_gradient_that_overflows_stops_before_it_reaches_the_weights() -> None:
    model = Overflows()
    with pytest.raises(TrainingDivergedError, match="gradient norm nan, at step 1 of 28"):
        fit(model, few(), CONFIG)
    assert bool((model.linear.weight == 0).all())


@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "save_every"])
@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one_are_refused_before_any_work(name: str, count: int) -> None:
    with pytest.raises(FitConfigError, match=f"{name} is {count}: it is a count, so give 1 or more"):
        replace(CONFIG, **{name: count})  # type: ignore[arg-type]  # the names of the int fields


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_right_answers_and_puts_the_mode_back(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(1.0), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(torch.eye(3))
        model.get_parameter("2.bias").zero_()
    model.train(training)
    data = TensorDataset(torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 0]))
    for batch_size in (1, 4, 1024):
        assert math.isclose(evaluate(model, data, batch_size), 5 / 6)
    assert model.training is training
    assert model[0].training is training
