"""Networks for small pictures, named in a configuration as `examples.models:resnet` and `examples.models:vit`.

A model for tnm-pipeline is any function that returns an `nn.Module` from one tensor to class scores; its keyword
arguments come from `model.args`.
"""

# B = pictures, C = channels, H, W = height and width, T = patches, D = features of a patch

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them; (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Features."""
        features = F.relu(self.first_norm(self.first(images)))
        return F.relu(self.second_norm(self.second(features)) + self.shortcut(images))


def resnet(width: int = 16, depth: int = 3, classes: int = 10) -> nn.Module:
    """The ResNet of He et al. (2016) for pictures of about 32 x 32: 6 * depth + 2 layers.

    Args:
        width: channels of the first third; doubled in the second and again in the third.
        depth: blocks in each third.
        classes: of the data.
    """
    channels = [width] * (depth + 1) + [2 * width] * depth + [4 * width] * depth
    blocks = [ResidualBlock(inputs, outputs, 1 if inputs == outputs else 2) for inputs, outputs in pairwise(channels)]
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
    return nn.Sequential(*stem, *blocks, *head)


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut; (B, T, D) -> (B, T, D).

    Attention is written with plain Linear layers, because those of nn.MultiheadAttention cannot be made sparse.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens that have looked at each other."""
        together = self.query_key_value(self.attention_norm(tokens))
        heads = together.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        changed: Tensor = tokens + self.contract(F.gelu(self.expand(self.norm(tokens))))
        return changed


class VisionTransformer(nn.Module):
    """Patches as tokens, a learned position each, transformer blocks, and a classifier of their mean."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.classifier(self.blocks(tokens).mean(1))
        return scores


def vit(
    size: int = 32, patch: int = 4, width: int = 128, depth: int = 6, heads: int = 4, classes: int = 10
) -> nn.Module:
    """A small vision transformer.

    Args:
        size: height and width of the pictures, as `size` of the data.
        patch: height and width of a patch; divides the size.
        width: D.
        depth: blocks.
        heads: of attention; divides the width.
        classes: of the data.
    """
    return VisionTransformer(size, patch, width, depth, heads, classes)
