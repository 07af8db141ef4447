"""Unstructured magnitude pruning: the kind of checkpoint that other tools leave behind."""

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def prune_unstructured(model: nn.Module, layers: Sequence[str], fraction: float) -> float:
    """Zero the smallest weights of the named layers, with one threshold over all of them.

    Args:
        model: changed in place.
        layers: dotted names of layers with a `weight`.
        fraction: of these layers' weights to zero, in (0, 1).

    Returns:
        The fraction that is zero afterwards; above `fraction` only if the weights had more zeros.
    """
    weights = [model.get_parameter(f"{name}.weight") for name in layers]
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    pruned = magnitudes.argsort(stable=True)[: round(fraction * len(magnitudes))]
    keep = torch.ones_like(magnitudes)
    keep[pruned] = 0
    for weight, part in zip(weights, torch.split(keep, [weight.numel() for weight in weights]), strict=True):
        weight.mul_(part.view_as(weight))
    return float(torch.cat([weight.flatten() == 0 for weight in weights]).double().mean())
