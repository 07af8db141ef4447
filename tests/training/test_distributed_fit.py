"""fit() on two processes: what one process learns, and again after a stop or a kill."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import fit_ranks
from tests.training.test_distributed import assert_equal, launch
from tnm_pipeline.training.processes import WorldSizeError, any_says, each_says, first_says, make_accelerator


def outcomes(what: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    done = launch(processes, fit_ranks.__file__, what, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{what}.{processes}.{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return outcomes("whole", 2, tmp_path_factory.mktemp("together"))


def assert_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert mine["history"] == other["history"]
    assert mine["score"] == other["score"]
    for kind in ("masks", "weights"):
        tensors: dict[str, Tensor] = mine[kind]
        assert_equal(tensors, other[kind])


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_the_same_global_batch(together: list[dict[str, Any]]) -> None:
    alone = fit_ranks.train()
    assert_same(together[0]["straight"], together[1]["straight"])
    pair = together[0]["straight"]
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
        assert_same(rank["resumed"], rank["straight"])


@pytest.mark.slow
def test_processes_go_on_bit_for_bit_after_a_kill(tmp_path: Path, together: list[dict[str, Any]]) -> None:
    died = launch(2, fit_ranks.__file__, "killed", tmp_path, DIE="1")
    assert died.returncode == 1
    assert f"exitcode: {-signal.SIGKILL}" in died.stderr
    assert (tmp_path / "killed").exists()
    for rank, outcome in enumerate(outcomes("killed", 2, tmp_path)):
        assert_same(outcome, together[rank]["straight"])


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    done = launch(3, fit_ranks.__file__, "whole", tmp_path)
    assert done.returncode == 1
    expected = (
        "a batch of 32 samples cannot be shared out evenly among 3 processes: make batch_size a multiple, such as 30"
    )
    assert f"WorldSizeError: {expected}" in done.stderr


def test_one_process_says_what_it_says() -> None:
    assert make_accelerator(7).num_processes == 1
    assert first_says(lambda: 3) == 3
    assert each_says("x") == ["x"]
    assert any_says(True, torch.device("cpu"))
    assert not any_says(False, torch.device("cpu"))
    assert issubclass(WorldSizeError, ValueError)
