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

from tnm_pipeline.training.callbacks.shared import go_on, scale_rate
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import LayerReport, Sparsifier


class SparsifierCallback(Callback):
    """Trains a LightningModule with masks, from the start of fitting to its end.

    Checkpoints hold the masks in this callback's state and the weights under the names of the plain model.

    Attributes:
        sparsifier: while fitting runs, and after it; `None` before.
        report: a row for every prunable layer, once fitting is through.
        masks: layer name -> bool mask, once fitting is through.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        recipe: Recipe | str = "dynamic",
        *,
        selection: Selection | None = None,
        scale_lr: bool = True,
    ) -> None:
        """Prepare; the module changes when fitting starts.

        Args:
            pattern: `Pattern` or its text form.
            recipe: `Recipe` or the name of one.
            selection: which layers; default: all but the last.
            scale_lr: multiply the learning rate by what the recipe asks for: the optimizer's is then that of dense
                training.

        Raises:
            PatternError, ValueError: the text form is wrong, or there is no such recipe.
        """
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.selection = selection
        self.scale_lr = scale_lr
        self.sparsifier: Sparsifier | None = None
        self.report: list[LayerReport] = []
        self.masks: dict[str, Tensor] = {}
        self._restored: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the layers; after a restart, with the masks of the checkpoint."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimizers and masks ride on the steps of one: make a "
                "Sparsifier for that one in the module's own code"
            )
        optimizer = trainer.optimizers[0]
        steps = trainer.estimated_stepping_batches
        self.sparsifier = Sparsifier(
            pl_module,
            optimizer,
            self.pattern,
            self.recipe,
            selection=self.selection,
            total_steps=int(steps) if isfinite(steps) else None,
        )
        if self._restored:
            go_on(self.sparsifier, self._restored["buffers"], self._restored["sparsifier"], "the checkpoint")
        elif self.scale_lr and self.recipe.lr_scale != 1.0:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scale_rate(optimizer, schedulers, self.recipe.lr_scale)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the zeros, verify them, and give the plain layers back."""
        assert self.sparsifier is not None
        self.report, self.masks = self.sparsifier.finalize()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the model's own names in the file: masks are in `state_dict`."""
        for name in self._current():
            checkpoint["state_dict"].pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The masks and the counters; empty when no training is under way."""
        if self.sparsifier is None or not self._current():
            return {}
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in self._current().items()}
        return {"buffers": buffers, "sparsifier": self.sparsifier.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until fitting starts."""
        self._restored = state_dict

    def _current(self) -> dict[str, Tensor]:
        return self.sparsifier.buffers() if self.sparsifier is not None else {}
