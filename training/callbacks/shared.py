"""What the callbacks have in common: going on with saved masks, and the learning rate that a recipe asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.sparsify import Sparsifier


@torch.no_grad()
def go_on(sparsifier: Sparsifier, buffers: Mapping[str, Tensor], state: dict[str, Any], place: str) -> None:
    """Put a training's masks and counters into a fresh Sparsifier.

    Args:
        sparsifier: just made.
        buffers: that `Sparsifier.buffers()` gave.
        state: that `Sparsifier.state_dict()` gave with them.
        place: where they come from, for the message.

    Raises:
        CheckpointError: they are of other layers.
    """
    own = sparsifier.buffers()
    if {name: tensor.shape for name, tensor in own.items()} != {name: part.shape for name, part in buffers.items()}:
        raise CheckpointError(
            f"{place} has masks and scales of {len(buffers)} tensors, this training of {len(own)}, or their shapes "
            "differ: go on with the same model, pattern, recipe and selection"
        )
    for name, tensor in own.items():
        tensor.copy_(buffers[name])
    sparsifier.load_state_dict(state)


def scale_rate(optimizer: Optimizer, schedulers: Sequence[Any], factor: float) -> None:
    """Multiply the rate of every group, now and in the schedules that are under way.

    Args:
        optimizer: its groups change.
        schedulers: those of torch.optim.lr_scheduler that steer it, at their start.
        factor: positive.
    """
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    for scheduler in schedulers:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
