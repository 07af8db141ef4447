"""A damped gram matrix in units in which every input has the same energy."""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256  # so that no second matrix of doubles is needed


def unit_diagonal(gram: Tensor, ridge: float) -> Tensor:
    """D (G + ridge I) D with the diagonal D that makes its diagonal 1.

    Args:
        gram: (K, K) float64, G.
        ridge: absolute damping; the damped diagonal must be positive.

    Returns:
        (K, K) float32.
    """
    scale = (gram.diagonal() + ridge).rsqrt()
    matrix = torch.empty_like(gram, dtype=torch.float32)
    for rows, own, factors in zip(
        matrix.split(_ROWS_AT_ONCE), gram.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE), strict=True
    ):
        rows.copy_((own * factors[:, None]).mul_(scale))
    matrix.diagonal().fill_(1.0)
    return matrix
