"""What the callbacks have in common: a training that begins, goes on from a checkpoint, and ends plain."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.finalize import LayerReport
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import Sparsifier

# What schedulers of torch.optim.lr_scheduler keep there: OneCycleLR, ReduceLROnPlateau, CyclicLR, CosineAnnealingLR
_RATES_OF_A_GROUP = {"lr", "initial_lr", "max_lr", "min_lr"}
_RATES_OF_A_SCHEDULE = ("base_lrs", "max_lrs", "min_lrs", "eta_min")


class Saved(NamedTuple):
    """What a checkpoint holds besides the plain model.

    Attributes:
        buffers: of `Sparsifier.buffers()`.
        state: of `Sparsifier.state_dict()`.
        place: where they come from, for messages.
    """

    buffers: Mapping[str, Tensor]
    state: dict[str, Any]
    place: str


class Sparsifying:
    """Trains a Trainer's model with masks, from the start of training to its end.

    Attributes:
        sparsifier: while training runs, and after it; `None` before.
        report: a row for every prunable layer, once training is through.
        masks: layer name -> bool mask, once training is through.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        recipe: Recipe | str = "dynamic",
        *,
        selection: Selection | None = None,
        scale_lr: bool = True,
    ) -> None:
        """Prepare; the model changes when training starts.

        Args:
            pattern: `Pattern` or its text form.
            recipe: `Recipe` or the name of one.
            selection: which layers; default: all but the last.
            scale_lr: multiply the learning rate by what the recipe asks for: the Trainer's is then that of dense
                training.

        Raises:
            PatternError, RecipeError: the text form is wrong, or there is no such recipe.
        """
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.selection = selection
        self.scale_lr = scale_lr
        self.sparsifier: Sparsifier | None = None
        self.report: list[LayerReport] = []
        self.masks: dict[str, Tensor] = {}

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedulers: Sequence[Any],
        total_steps: int | None,
        saved: Saved | None,
    ) -> None:
        """Swap the layers.

        Args:
            model: plain.
            optimizer: of its parameters.
            schedulers: that steer the optimizer's rate.
            total_steps: of the whole training; `None` = not known.
            saved: of the checkpoint that training goes on from; `None` at the start.

        Raises:
            CheckpointError: what was saved is of other layers.
        """
        self.sparsifier = Sparsifier(
            model, optimizer, self.pattern, self.recipe, selection=self.selection, total_steps=total_steps
        )
        if saved is not None:
            _go_on(self.sparsifier, saved)
        elif self.scale_lr:
            _scale_rate(optimizer, schedulers, self.recipe.lr_scale)

    def end(self) -> None:
        """Write the zeros, verify them, and give the plain layers back.

        Also where the Trainer stopped early, with a warning: it goes on to save the model, and there is no way back.
        """
        assert self.sparsifier is not None
        self.report, self.masks = self.sparsifier.finalize(strict=False)


@torch.no_grad()
def _go_on(sparsifier: Sparsifier, saved: Saved) -> None:
    own = sparsifier.buffers()
    if {name: part.shape for name, part in own.items()} != {name: part.shape for name, part in saved.buffers.items()}:
        raise CheckpointError(
            f"{saved.place} has masks and scales of {len(saved.buffers)} tensors, this training of {len(own)}, or "
            "their shapes differ: go on with the same model, pattern, recipe and selection"
        )
    for name, tensor in own.items():
        tensor.copy_(saved.buffers[name])
    sparsifier.load_state_dict(saved.state)


def _scale_rate(optimizer: Optimizer, schedulers: Sequence[Any], factor: float) -> None:
    """Multiply the rate of every group, now and in the schedules that are at their start."""
    for group in optimizer.param_groups:
        for name in _RATES_OF_A_GROUP & group.keys():
            group[name] *= factor
    for scheduler in schedulers:
        _scale_schedule(scheduler, factor)


def _scale_schedule(scheduler: Any, factor: float) -> None:
    for part in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _scale_schedule(part, factor)
    for name in _RATES_OF_A_SCHEDULE:
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list):
            setattr(scheduler, name, [rate * factor for rate in rates])
        elif isinstance(rates, float):
            setattr(scheduler, name, rates * factor)
