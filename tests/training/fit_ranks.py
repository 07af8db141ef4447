"""What the processes of the tests of `fit` do: `torchrun fit_ranks.py WHAT FOLDER`; Accelerate makes them meet."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.loop import FitConfig, SparseTraining, TrainingStoppedError, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.processes import count, leave, rank
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sources import Splits, digits
from tnm_pipeline.training.teacher import Teacher

# 128 samples: 4 steps an epoch, 12 in all, state files after steps 5 and 10
CONFIG = FitConfig(epochs=3, batch_size=32, save_every=5)
DROPOUT = 0.3
SPARSITY = SparseTraining(Pattern(2, 4, transposable=True), Recipe("mine", refresh_every=3, decay=1e-3))


def train(
    state: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    dropout: float = 0.0,
    share: float = 0.0,
) -> dict[str, Any]:
    """The weights begin apart, a teacher's too: those of the first process are sent around."""
    data = digits()
    few = Splits(TensorDataset(*data.train[:128]), TensorDataset(*data.test[:100]))
    torch.manual_seed(rank())
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), share) if share else None
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 18), nn.Dropout(dropout), nn.ReLU(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 10)
    )
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    try:
        result = fit(
            model,
            few,
            CONFIG,
            sparsity=SPARSITY,
            teacher=teacher,
            state_path=state,
            on_step=on_step,
            should_stop=should_stop,
        )
    finally:
        assert model.get_parameter("idle").requires_grad, "what rested under DDP learns again"
    return {
        "processes": count(),
        "history": result.history,
        "masks": result.masks,
        "weights": model.state_dict(),
        "score": result.score,
        "drawn": float(torch.rand(())),
    }


def whole(folder: Path) -> dict[str, Any]:
    """To the end at once; then with dropout, and again, stopped by the last process after step 7, and on from there."""
    steps = [0]

    def on_step(done: int, _: int) -> None:
        steps[0] = done

    outcome = {"straight": train(), "taught": train(share=0.5), "drawing": train(dropout=DROPOUT)}
    try:
        train(folder / "stopped", on_step, lambda: steps[0] == 7 and rank() == count() - 1, DROPOUT)
    except TrainingStoppedError as error:
        return {**outcome, "stop": str(error), "resumed": train(folder / "stopped", dropout=DROPOUT)}
    raise AssertionError("nothing stopped it")


def killed(folder: Path) -> dict[str, Any]:
    """To the end, unless told to die: the last process does after step 9, without a word."""

    def on_step(done: int, _: int) -> None:
        if done == 9 and "DIE" in os.environ and rank() == count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(folder / "killed", on_step, dropout=DROPOUT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    outcome = globals()[what](folder)
    torch.save(outcome, folder / f"{what}.{count()}.{rank()}.pt")
    if torch.distributed.is_initialized():
        leave()
