"""The optimizer and the learning rate schedule of `fit`."""

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

OptimizerName = Literal["sgd", "adamw"]
_SECOND_MOMENT = 0.999  # of AdamW, as everywhere


def make_optimizer(
    name: OptimizerName, model: nn.Module, *, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Nesterov SGD or AdamW; biases and norms, which have one dimension, are not decayed.

    Args:
        name: `sgd`, whose weight decay joins the gradient (L2), or `adamw`, which takes it off the weights.
        model: whose parameters.
        lr: learning rate.
        momentum: of SGD; of AdamW, the decay rate of the gradients' mean (beta 1).
        weight_decay: of weights with two or more dimensions.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, _SECOND_MOMENT))
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at a step: linear up, then a cosine to zero.

    Args:
        step: optimizer steps done.
        steps: of the whole training.
        warmup: fraction of them in which the rate rises.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
