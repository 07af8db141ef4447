"""Sharded checkpoints: whole or not there, for any number of processes, and without a trace in the training."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.training import ranks
from tests.training.test_distributed import assert_equal, launch, results
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sharded import load_sharded, save_sharded
from tnm_pipeline.training.sparsify import Sparsifier

RECIPE = Recipe("mine", refresh_every=2, decay=5e-3)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01),
}


def prepare(
    optimizer: str, pattern: str = "2:4-T", seed: int = 0, recipe: Recipe = RECIPE
) -> tuple[nn.Sequential, Optimizer, Sparsifier]:
    model = ranks.net(seed)
    stepper = OPTIMIZERS[optimizer](model)
    return model, stepper, Sparsifier(model, stepper, pattern, recipe, total_steps=9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, results("saving", 2, folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_goes_on_and_the_same_number_to_the_same_bits(
    saved: tuple[Path, list[dict[str, Any]]], processes: int
) -> None:
    folder, (first, second) = saved
    assert_equal(first["end"], second["end"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000002"]
    for rank in results("going_on", processes, folder):
        assert rank["step"] == 6
        assert_equal(rank["loaded"], first["saved"])  # masks and leaks among them
        assert rank["state"]["step"] == ranks.STEPS
        if processes == 2:
            assert_equal(rank["end"], first["end"])
            flips = [
                [refresh["flip_rate"] for refresh in state["telemetry"]] for state in (rank["state"], first["state"])
            ]
            assert flips[0] == flips[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "event", "left"),
    [
        (1, "open:000002/__0_0.distcp", 3),
        (1, "os.rename:000002/.metadata.tmp", 3),
        (1, "shutil.rmtree:000001", 6),
        (2, "open:000002/__1_0.distcp", 3),
    ],
    ids=["parts", "end", "clearing", "second process"],
)
def test_a_kill_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, processes: int, event: str, left: int
) -> None:
    died = launch(processes, ranks.__file__, "dying", tmp_path, DIE_AT=event)
    assert died.returncode == (-signal.SIGKILL if processes == 1 else 1), died.stderr
    assert len(list((tmp_path / "checkpoints").iterdir())) > 1 or left == 6
    model, optimizer, sparsifier = ranks.prepared(seed=1)
    assert load_sharded(tmp_path / "checkpoints", model, optimizer, sparsifier) == {"step": left}
    assert sparsifier.step == left
    save_sharded(tmp_path / "checkpoints", model, optimizer, sparsifier, {"step": 7})
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_what_fails_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    first, second = results("failing", 2, tmp_path)
    denied = "PermissionError: [Errno 13] Permission denied: 'of process {}'"
    for rank in (first, second):
        assert rank.pop("state").startswith("IsADirectoryError: ")
        assert rank == {
            "clearing": denied.format(0),
            "writing": denied.format(1),
            "removing": denied.format(0),
            "finding": denied.format(0),
            "reading": denied.format(1),
            "after": "no error",
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saving_leaves_no_trace_and_loading_undoes_everything(tmp_path: Path, name: str) -> None:
    ends: list[dict[str, Tensor]] = []
    states = []
    for saves in (False, True):
        model, optimizer, sparsifier = prepare(name)
        for step in range(5):
            if saves:  # at step 0 too, where an optimizer has no state
                save_sharded(tmp_path, model, optimizer, sparsifier, {"step": step})
            ranks.train(model, optimizer, step, 1)
        ends.append(model.state_dict())
        states.append([refresh.flip_rate for refresh in sparsifier.telemetry])
    assert_equal(*ends)
    assert states[0] == states[1]
    assert len(states[0]) == 2
    model, optimizer, sparsifier = prepare(name, seed=1)
    optimizer.param_groups[0]["lr"] = 123.0
    assert load_sharded(tmp_path, model, optimizer, sparsifier) == {"step": 4}
    ranks.train(model, optimizer, 4, 1)
    assert_equal(model.state_dict(), ends[0])
    assert sparsifier.step == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_step_0_begins_anew(tmp_path: Path, name: str) -> None:
    model, optimizer, sparsifier = prepare(name)
    save_sharded(tmp_path, model, optimizer, sparsifier, {})
    drawn = torch.rand(2)
    ranks.train(model, optimizer, 0, 3)
    twin, twin_optimizer, twin_sparsifier = prepare(name, seed=1)
    load_sharded(tmp_path, twin, twin_optimizer, twin_sparsifier)
    assert torch.equal(torch.rand(2), drawn)
    ranks.train(twin, twin_optimizer, 0, 3)
    assert_equal(twin.state_dict(), model.state_dict())


def test_what_is_no_checkpoint_or_another_ones_is_refused(tmp_path: Path) -> None:
    model, optimizer, sparsifier = prepare("adamw")
    (tmp_path / "000001").mkdir()  # of a kill
    assert load_sharded(tmp_path, model, optimizer, sparsifier) is None
    assert load_sharded(tmp_path / "nowhere", model, optimizer, sparsifier) is None
    ranks.train(model, optimizer, 0, 1)
    save_sharded(tmp_path, model, optimizer, sparsifier, {})
    with pytest.raises(
        CheckpointError, match=r"saved while training with pattern 2:4-T, .* was made for pattern 2:4: "
    ):
        load_sharded(tmp_path, *prepare("adamw", "2:4"))
    changed = replace(RECIPE, decay=1e-3, ramp=(0.1, 0.5))
    with pytest.raises(
        CheckpointError, match=r"with decay 0\.005, ramp None, .* for decay 0\.001, ramp \[0\.1, 0\.5\]: "
    ):
        load_sharded(tmp_path, *prepare("adamw", recipe=changed))
    load_sharded(tmp_path, *prepare("adamw", recipe=replace(RECIPE, summary="reworded")))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    stepper = AdamW(other.parameters())
    with pytest.raises(CheckpointError, match="is of another model or optimizer: "):
        load_sharded(tmp_path, other, stepper, Sparsifier(other, stepper, "2:4-T", sparsifier.recipe))
