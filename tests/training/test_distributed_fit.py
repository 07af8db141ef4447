"""fit() on two processes: what one process learns, and again after a stop or a kill, dropout included."""

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.training import fit_ranks
from tests.training.test_distributed import assert_equal, launch
from tnm_pipeline.training.loop import FitConfig, fit
from tnm_pipeline.training.processes import BatchSizeError, all_do, any_says, each_says, first_says, make_accelerator
from tnm_pipeline.training.sources import Splits, digits, digits_mlp


def outcomes(what: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    done = launch(processes, fit_ranks.__file__, what, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{what}.{processes}.{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Any]]:
    return outcomes("whole", 2, folder)


def assert_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert mine["history"] == other["history"]
    assert mine["score"] == other["score"]
    for kind in ("masks", "weights"):
        tensors: dict[str, Tensor] = mine[kind]
        assert_equal(tensors, other[kind])


@pytest.mark.slow
@pytest.mark.parametrize(("what", "share"), [("straight", 0.0), ("taught", 0.5)])
def test_two_processes_learn_what_one_learns_with_the_same_global_batch(
    together: list[dict[str, Any]], what: str, share: float
) -> None:
    alone = fit_ranks.train(share=share)
    assert_same(together[0][what], together[1][what])
    pair = together[0][what]
    assert (alone["processes"], pair["processes"]) == (1, 2)
    for mine, other in zip(pair["history"].loss, alone["history"].loss, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert pair["history"].flip_rate == alone["history"].flip_rate
    assert [step for step, _ in alone["history"].flip_rate] == [3, 6, 9]
    assert max(rate for _, rate in alone["history"].flip_rate) > 0
    assert_equal(pair["masks"], alone["masks"])
    for name, weight in pair["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_process_that_asks_stops_all_and_all_go_on_bit_for_bit(together: list[dict[str, Any]]) -> None:
    for rank in together:
        assert rank["stop"] == "stopped after step 7 of 12; the same command goes on from there"
        assert_same(rank["resumed"], rank["drawing"])
        assert rank["resumed"]["drawn"] == rank["drawing"]["drawn"]


@pytest.mark.slow
def test_every_process_draws_numbers_of_its_own(together: list[dict[str, Any]]) -> None:
    drawing = [rank["drawing"] for rank in together]
    assert_same(drawing[0], drawing[1])
    assert drawing[0]["drawn"] != drawing[1]["drawn"]
    assert drawing[0]["history"].loss != together[0]["straight"]["history"].loss


@pytest.mark.slow
def test_one_process_goes_on_with_the_state_of_two(folder: Path, together: list[dict[str, Any]]) -> None:
    alone = fit_ranks.train(folder / "stopped", dropout=fit_ranks.DROPOUT)
    (steps, before), (_, other) = alone["history"].loss[1], together[0]["drawing"]["history"].loss[1]
    assert (steps, before) == (8, other)  # of the state file, which is that of step 10
    assert [step for step, _ in alone["history"].score] == [4, 8, 12]


@pytest.mark.slow
def test_processes_go_on_bit_for_bit_after_a_kill(tmp_path: Path, together: list[dict[str, Any]]) -> None:
    died = launch(2, fit_ranks.__file__, "killed", tmp_path, DIE="1")
    assert died.returncode == 1
    assert f"exitcode: {-signal.SIGKILL}" in died.stderr
    assert (tmp_path / "killed").exists()
    for rank, outcome in enumerate(outcomes("killed", 2, tmp_path)):
        assert_same(outcome, together[rank]["drawing"])
        assert outcome["drawn"] == together[rank]["drawing"]["drawn"]


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    done = launch(3, fit_ranks.__file__, "whole", tmp_path)
    assert done.returncode == 1
    expected = (
        "a batch of 32 samples cannot be cut into 3 equal parts (processes x accumulate = 3 x 1): make batch_size"
    )
    assert f"BatchSizeError: {expected} a multiple of 3, such as 30" in done.stderr


def test_one_process_says_what_it_says() -> None:
    assert make_accelerator(7).num_processes == 1
    assert first_says(lambda: 3) == 3
    assert each_says("x") == ["x"]
    assert all_do(lambda: 4) == 4
    assert any_says(True, torch.device("cpu"))
    assert not any_says(False, torch.device("cpu"))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "advice"),
    [
        (32, 3, "a multiple of 3, such as 30, or accumulate one of [1, 2, 4, 8, 16, 32]"),
        (6, 4, "a multiple of 4, such as 4, or accumulate one of [1, 2, 3, 6]"),  # chunk() would make 3 parts
        (2, 4, "a multiple of 4, such as 4, or accumulate one of [1, 2]"),
    ],
)
def test_parts_of_different_sizes_or_of_no_sample_are_refused(batch_size: int, accumulate: int, advice: str) -> None:
    with pytest.raises(BatchSizeError, match=re.escape(advice)):
        make_accelerator(batch_size, accumulate)
    make_accelerator(32, 4)


def test_a_training_set_smaller_than_a_batch_is_the_batch() -> None:
    data = digits()
    few = Splits(TensorDataset(*data.train[:6]), data.test)
    config = FitConfig(epochs=2, batch_size=8, accumulate=3)
    assert [step for step, _ in fit(digits_mlp(), few, config).history.loss] == [1, 2]
    with pytest.raises(BatchSizeError, match=r"a batch of 6 samples cannot be cut into 4 equal parts"):
        fit(digits_mlp(), few, replace(config, accumulate=4))
