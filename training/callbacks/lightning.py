"""Sparse training in the Trainer of PyTorch Lightning: one callback.

```python
sparsity = SparsifierCallback("2:4-T")
trainer = Trainer(max_epochs=30, callbacks=[sparsity])
trainer.fit(module, data)     # also with ckpt_path=...; afterwards layers are plain and zeros written
```
"""

from math import isfinite
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tnm_pipeline.training.callbacks.shared import Saved, Sparsifying
from tnm_pipeline.training.checkpoint import CheckpointError


class SparsifierCallback(Sparsifying, Callback):
    """Trains a LightningModule with masks.

    Checkpoints hold the masks in this callback's state, and the weights under the names of the plain model.
    """

    _saved: Saved | None = None

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the plain layers back."""
        self.end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the plain model's names in the file: the rest is in `state_dict`."""
        for name in self._buffers():
            checkpoint["state_dict"].pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The masks and the counters; empty when no training is under way."""
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in self._buffers().items()}
        if self.sparsifier is None or not buffers:
            return {}
        return {"buffers": buffers, "sparsifier": self.sparsifier.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until fitting starts."""
        if state_dict:
            self._saved = Saved(state_dict["buffers"], state_dict["sparsifier"], "the checkpoint")

    def _buffers(self) -> dict[str, Tensor]:
        return self.sparsifier.buffers() if self.sparsifier is not None else {}
