"""fit() on sentence pairs and on class folders: it learns, goes on bit for bit after a kill, and writes its curves."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.labelled import write_encoder, write_images, write_pairs
from tnm_pipeline.training.loop import FitConfig, FitResult, SparseTraining, TrainingStoppedError, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sources import Splits, digits, load_data, load_model

# 134 pairs and 40 pictures: 8 and 5 steps an epoch
PAIRS = FitConfig(epochs=2, batch_size=16, optimizer="adamw", lr=2e-3, weight_decay=0.01, save_every=5)
IMAGES = FitConfig(epochs=4, batch_size=8, lr=0.05, save_every=4)
RECIPE = Recipe("mine", 3, decay=5e-3, freeze_at=0.7)
SPARSE = SparseTraining(Pattern(2, 4, transposable=True), RECIPE, Selection(keep_last=False))


def pairs(folder: Path) -> tuple[nn.Module, Splits]:
    """An encoder with dropout and the pairs that it learns from."""
    arguments = {"tokenizer": str(folder / "bert"), "test_where": {"task": "2014*"}}
    return load_model(f"hf:{folder / 'bert'}", {}), load_data(str(folder / "pairs.tsv"), arguments)


def images(folder: Path) -> tuple[nn.Module, Splits]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    arguments = {"size": 8, "resize": 8, "flip": False, "pad": 1}
    return net, load_data(str(folder / "pictures"), arguments)


Task = tuple[Callable[[Path], tuple[nn.Module, Splits]], FitConfig]
TASKS: dict[str, Task] = {"pairs": (pairs, PAIRS), "images": (images, IMAGES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fine-tuning")
    write_encoder(target / "bert")
    write_pairs(target / "pairs.tsv")
    write_images(target / "pictures")
    return target


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(folder: Path, task: str, state: Path | None = None, stop_at: int = 0, events: Path | None = None) -> FitResult:
    load, config = TASKS[task]
    model, data = load(folder)
    done = [0]

    def on_step(step: int, _: int) -> None:
        done[0] = step

    result = fit(
        model,
        data,
        config,
        sparsity=SPARSE,
        state_path=state,
        events=events,
        on_step=on_step,
        should_stop=lambda: done[0] == stop_at,
    )
    result.masks.update({f"weights of {name}": tensor for name, tensor in model.state_dict().items()})
    return result


def assert_same(one: FitResult, other: FitResult) -> None:
    assert one.masks.keys() == other.masks.keys()
    assert all(torch.equal(tensor, other.masks[name]) for name, tensor in one.masks.items())
    assert (one.metric, one.score, one.history, one.layers) == (other.metric, other.score, other.history, other.layers)


def be_killed(folder: Path, task: str, state: Path, step: int) -> None:
    """Train, and die between two state files without a word."""

    def on_step(done: int, _: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    load, config = TASKS[task]
    fit(*load(folder), config, sparsity=SPARSE, state_path=state, on_step=on_step)


def test_both_are_learned_with_masks_that_hold(folder: Path, task: str) -> None:
    load, config = TASKS[task]
    model, data = load(folder)
    result = fit(model, data, replace(config, epochs=3 * config.epochs), sparsity=SPARSE)
    before = fit(load(folder)[0], data, replace(config, epochs=1, lr=1e-9))
    assert result.metric == {"pairs": "spearman", "images": "accuracy"}[task]
    assert result.score > max(before.score + 0.1, {"pairs": 0.4, "images": 0.9}[task])
    assert len([row for row in result.layers if row.pattern]) == {"pairs": 13, "images": 3}[task]
    assert sum((row.violations or 0) + (row.violations_transposed or 0) for row in result.layers) == 0
    assert result.history.score[-1][1] == pytest.approx(result.score, abs=0.05)


def test_a_killed_training_goes_on_bit_for_bit(folder: Path, task: str, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    script = (
        "import runpy, sys; from pathlib import Path; folder, task, state, step = sys.argv[2:];"
        "runpy.run_path(sys.argv[1])['be_killed'](Path(folder), task, Path(state), int(step))"
    )
    process = subprocess.run([sys.executable, "-c", script, __file__, folder, task, state, "13"], check=False)
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    torch.manual_seed(12345)  # another process would have other generators
    assert_same(run(folder, task, state), run(folder, task))


@pytest.mark.parametrize("stop_at", [5, 8, 11])
def test_a_stopped_training_goes_on_bit_for_bit(folder: Path, task: str, tmp_path: Path, stop_at: int) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError):
        run(folder, task, state, stop_at)
    torch.manual_seed(12345)
    assert_same(run(folder, task, state), run(folder, task))


def test_parts_of_a_batch_give_the_masks_of_the_whole(folder: Path) -> None:
    """Without dropout and batch norm, which see the parts, only the order of sums differs."""
    for accumulate in (2, 4):
        results = []
        for parts in (1, accumulate):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10))
            config = FitConfig(epochs=1, batch_size=32, accumulate=parts)
            masks = fit(
                model, digits(), config, sparsity=replace(SPARSE, recipe=replace(RECIPE, refresh_every=5))
            ).masks
            results.append((model, masks))
        (whole, masks), (cut, other_masks) = results
        assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
        for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_decay_of_adamw_is_decoupled_and_spares_biases() -> None:
    """With gradients of zero, matrices shrink by lr * decay a step, as warmup and cosine have it."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(inputs), 10) + 0 * (self.weight.sum() + self.bias.sum())

    model = Constant()
    config = FitConfig(epochs=1, batch_size=1347, optimizer="adamw", lr=0.1, weight_decay=0.5)
    fit(model, digits(), config)  # one step, at the peak
    assert torch.equal(model.bias, torch.ones(4))
    torch.testing.assert_close(model.weight, torch.full((4, 4), 1 - 0.1 * 0.5))


def curves(events: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(events)).Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_the_curves_once_although_the_training_was_stopped(folder: Path, tmp_path: Path) -> None:
    whole, parts, state = tmp_path / "whole", tmp_path / "parts", tmp_path / "state.safetensors"
    result = run(folder, "images", events=whole)
    with pytest.raises(TrainingStoppedError):
        run(folder, "images", state, stop_at=11, events=parts)
    run(folder, "images", state, events=parts)
    found = curves(whole)
    times = [name for name in found if name.endswith(("seconds", "share"))]
    assert "masks/seconds" in times
    again = curves(parts)
    assert {name: found[name] for name in found.keys() - times} == {name: again[name] for name in found.keys() - times}
    for name, points in (("training loss", result.history.loss), ("test accuracy", result.history.score)):
        np.testing.assert_allclose(found[f"epoch/{name}"], points, rtol=1e-6)
    np.testing.assert_allclose(found["masks/flip rate"], result.history.flip_rate, rtol=1e-6)
    assert [step for step, _ in found["masks/kept magnitude"]] == [3, 6, 9, 12]
    assert {value for _, value in found["masks/density"]} == {0.5}
    rates = [value for _, value in found["epoch/learning rate"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < IMAGES.lr


def test_event_files_of_steps_that_are_taken_again_are_hidden_and_those_of_another_training_removed(
    folder: Path, tmp_path: Path
) -> None:
    """A kill at step 11 after the state of step 4 leaves events of steps that come again."""
    events, state = tmp_path / "events", tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError):
        run(folder, "images", state, stop_at=4, events=events)
    kept = state.read_bytes()
    with pytest.raises(TrainingStoppedError):
        run(folder, "images", state, stop_at=11, events=events)
    state.write_bytes(kept)
    result = run(folder, "images", state, events=events)
    assert [step for step, _ in curves(events)["epoch/test accuracy"]] == [5, 10, 15, 20]
    assert [step for step, _ in curves(events)["masks/flip rate"]] == [step for step, _ in result.history.flip_rate]
    run(folder, "images", events=events)
    assert len(list(events.iterdir())) == 1
