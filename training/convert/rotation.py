"""The basis of attention heads in which masks keep the most, and the change to it.

Any orthogonal matrix may be put between the value and the output projection of a head, and applied to its queries and
keys alike (`heads.py`): the network computes the same. Of the weights' energy in an arbitrary basis, 2:4 keeps 87%; in
the basis found here 92%. The search takes turns: the best masks for the basis, then the basis in which the weights come
closest to what the masks keep, an orthogonal Procrustes problem in every head.

Source: the alternation is that of Gong and Lazebnik 2011 (iterative quantization), with masks in place of signs. Bases
chosen before pruning: Gu et al. 2025 (DenoiseRotator), by gradient descent on entropies.

Shape legend: H = heads, D = channels of one, K = entries of the weight for one channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.dataflow import held_tensor
from tnm_pipeline.training.convert.heads import HeadPart, HeadSpace
from tnm_pipeline.training.masks import keep, solve
from tnm_pipeline.training.pattern import Pattern

_STEPS = 30  # of the alternation: docs/log.md
# Of the rotated weights themselves, this share of what the masks keep is taken off before the next basis is fitted. It
# changes no optimum, for their energy is the same in all bases, but makes steps longer: too long for any optimum at
# first, so that poor ones are left, and shorter from step to step.
_BOLDEST, _LEAST_BOLD = 0.95, 0.7
_LEAST_GAIN = 1e-4  # in the share that is kept; less is not worth the rounding of all weights


@dataclass(frozen=True, eq=False)
class Rotation:
    """A new basis for the heads of one attention.

    Attributes:
        space: the heads.
        matrix: (H, D, D) float64, on the CPU, orthogonal: channels become `matrix @ channels`, head by head.
        kept_before: share of the energy of the heads' weights that masks keep without it.
        kept_after: and with it.
    """

    space: HeadSpace
    matrix: Tensor
    kept_before: float
    kept_after: float

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Change the basis in place; the network computes the same, up to rounding.

        Args:
            model: the traced one, or one with the same modules.
        """
        for part in self.space.parts:
            weight = held_tensor(model, f"{part.layer}.weight")
            bias = getattr(model.get_submodule(part.layer), "bias", None)
            tensors = [weight.T] if part.axis else [weight] if bias is None else [weight, bias[:, None]]
            for tensor in tensors:
                rows = part.index.flatten().to(tensor.device)
                blocks = tensor[rows].double().view(*part.index.shape, -1)
                turned = self.matrix.to(tensor.device) @ blocks
                tensor.index_copy_(0, rows, turned.flatten(0, 1).to(tensor.dtype))

    def to_dict(self) -> dict[str, object]:
        """For JSON, without the matrix."""
        return {
            "layers": [part.layer for part in self.space.parts],
            "heads": len(self.matrix),
            "kept_before": self.kept_before,
            "kept_after": self.kept_after,
        }


@torch.no_grad()
def search_rotation(model: nn.Module, space: HeadSpace, patterns: Mapping[str, Pattern]) -> Rotation | None:
    """Search the basis of the heads in which the masks of both layers keep the most energy.

    O(H D^2 K) a step and layer, and a mask.

    Args:
        model: the traced one, or one with the same modules; unchanged.
        space: the heads.
        patterns: of the layers that get masks.

    Returns:
        `None` if neither layer gets masks, none was found that keeps more, or a weight is NaN or infinite,
        which the conversion refuses later.
    """
    first = space.parts[0]
    # a head counts in the output projection as much as its values are large
    carried = _blocks(model, first).flatten(1).norm(dim=1)[:, None, None]
    sides = [
        _Side(model, part, patterns[part.layer], carried if part.axis else torch.ones_like(carried))
        for part in space.parts
        if part.layer in patterns
    ]
    if not sides or not all(bool(torch.isfinite(side.blocks).all()) for side in sides):
        return None
    matrix = best = torch.eye(first.index.shape[1], device=sides[0].blocks.device).expand(len(first.index), -1, -1)
    before = after = 0.0
    for step in range(_STEPS):
        kept = sum(side.project(matrix) for side in sides) / len(sides)
        if step == 0:
            before = after = kept
        elif kept > after:
            best, after = matrix, kept
        boldness = before * (_BOLDEST + (_LEAST_BOLD - _BOLDEST) * step / _STEPS)
        pulls = sum((side.pull(boldness) for side in sides), torch.zeros_like(matrix))
        matrix = _nearest_rotation(pulls)
    if after < before + _LEAST_GAIN:
        return None
    return Rotation(space, _nearest_rotation(best.double()).cpu(), before, after)


class _Side:
    """One layer's weights in the basis of the moment.

    Attributes:
        blocks: (H, D, K) float32 in the basis that they are given in, with a total energy of 1.
    """

    def __init__(self, model: nn.Module, part: HeadPart, pattern: Pattern, scale: Tensor) -> None:
        blocks = _blocks(model, part) * scale
        self.blocks = blocks / (float(blocks.norm()) or 1.0)
        self._rows = part.index.flatten().to(blocks.device)
        self._axis = part.axis
        self._pattern = pattern
        # all of the layer: groups of a pattern do not end where heads do
        self._weight = held_tensor(model, f"{part.layer}.weight").detach().float().clone()
        self._turned = self._kept = self.blocks

    def project(self, matrix: Tensor) -> float:
        """Change to another basis and find the mask there; returns the share of the energy that it keeps."""
        self._turned = matrix @ self.blocks
        by_channel = self._weight.T if self._axis else self._weight
        by_channel.index_copy_(0, self._rows, self._turned.flatten(0, 1))
        mask = solve(self._weight, self._pattern, importance=self._weight.square())
        self._kept = keep(self._turned, (mask.T if self._axis else mask)[self._rows].view_as(self._turned))
        return float(self._kept.square().sum(dtype=torch.float64))

    def pull(self, boldness: float) -> Tensor:
        """(H, D, D): in its direction more is kept."""
        return (self._kept - boldness * self._turned) @ self.blocks.mT


def _blocks(model: nn.Module, part: HeadPart) -> Tensor:
    """A layer's weights by head and channel: (H, D, K) float32."""
    weight = held_tensor(model, f"{part.layer}.weight").detach().float()
    return (weight.T if part.axis else weight)[part.index.to(weight.device)]


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """The orthogonal matrix with the largest inner product."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest
