"""TensorBoard's event files of one training."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tnm_pipeline.training.telemetry import Refresh

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFiles:
    """Writes curves that `tensorboard --logdir FOLDER` draws.

    Args:
        folder: made if it is not there. Event files in it are removed when a training begins; when one goes on, what
            they hold of later steps is hidden. None: nothing is written.
        done: optimizer steps that the training has done already.
    """

    def __init__(self, folder: Path | None, done: int) -> None:
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        from torch.utils import tensorboard  # a third of a second

        if not done:
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def add_epoch(self, step: int, values: Mapping[str, float]) -> None:
        """Add what an epoch ended with.

        Args:
            step: optimizer steps done.
            values: by name.
        """
        self._add("epoch", step, values)
        if self._writer:
            self._writer.flush()  # a kill loses less than an epoch

    def add_refresh(self, refresh: Refresh) -> None:
        """Add what an update of the masks did and took."""
        figures = {name.replace("_", " "): value for name, value in asdict(refresh).items() if name != "step"}
        self._add("masks", refresh.step, figures)

    def close(self) -> None:
        """Write what is left."""
        if self._writer:
            self._writer.close()

    def _add(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if self._writer and value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)
