"""Sparse training in the Trainer of PyTorch Lightning: one callback.

```python
sparsity = SparsifierCallback("2:4-T")
trainer = Trainer(max_epochs=30, callbacks=[sparsity])
trainer.fit(module, data)     # also with ckpt_path=...; afterwards layers are plain and zeros written
```
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from tnm_pipeline.training.callbacks.shared import Saved, Sparsifying
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.processes import count, each_says, rank
from tnm_pipeline.training.state import RandomState, random_state, set_random_state


class SparsifierCallback(Sparsifying, Callback):
    """Trains a LightningModule with masks.

    Checkpoints hold the masks and the random generators of every process in this callback's state, and the weights
    under the names of the plain model.
    """

    _saved: Saved | None = None
    _generators: Sequence[RandomState] = ()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the layers; after a restart, with the masks of the checkpoint.

        Raises:
            ValueError: the module has no or several optimizers.
            CheckpointError: the checkpoint holds no masks, or those of other layers.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimizers and masks ride on the steps of one: make a "
                "Sparsifier for that one in the module's own code"
            )
        steps = trainer.estimated_stepping_batches
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        total_steps = int(steps) if isfinite(steps) else None
        saved, self._saved = self._saved, None
        if trainer.ckpt_path is not None and saved is None:
            raise CheckpointError(
                f"{trainer.ckpt_path} holds no masks: go on from a checkpoint that was written with "
                "SparsifierCallback, or load the weights into the module and start without ckpt_path"
            )
        self.begin(pl_module, trainer.optimizers[0], schedulers, total_steps, saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After a restart in the middle of an epoch, forget what starting an iterator drew: it had been started."""
        if batch_idx > 0:
            self._put_generators_back()
        self._generators = ()

    def _put_generators_back(self) -> None:
        """Where the number of processes is the same; else they stay as they are."""
        if len(self._generators) == count():
            set_random_state(*self._generators[rank()])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the plain layers back."""
        self.end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the plain model's names in the file: the rest is in `state_dict`."""
        for name in self._buffers():
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until fitting starts; put the generators back at once.

        Else what starts the epoch's iterator early, as counting its steps does, would draw from others.
        """
        state = checkpoint["callbacks"].get(self.state_key)
        if state and trainer.state.fn == TrainerFn.FITTING:
            self._saved = Saved(state["buffers"], state["sparsifier"], "the checkpoint")
            self._generators = state["generators"]
            self._put_generators_back()

    def state_dict(self) -> dict[str, Any]:
        """The masks, the counters and the generators, for all processes to call; empty when none trains."""
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in self._buffers().items()}
        if self.sparsifier is None or not buffers:
            return {}
        generators = each_says(random_state())
        return {"buffers": buffers, "sparsifier": self.sparsifier.state_dict(), "generators": generators}

    def _buffers(self) -> dict[str, Tensor]:
        return self.sparsifier.buffers() if self.sparsifier is not None else {}
