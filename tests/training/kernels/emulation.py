"""cuSPARSELt's two operators in plain torch: packs hold half of the values, so nothing else can be multiplied.

Shape legend: T = tokens, O = out features, I = in features, S = I / 2 values and I / 16 words of places.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.kernels.semi_structured import PackedWeight, sparse_linear
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

TWO_FOUR, TRANSPOSABLE = Pattern(2, 4), Pattern(2, 4, transposable=True)


class Emulation:
    """Implements the operators for CPU tensors until `close`, and counts the calls."""

    def __init__(self) -> None:
        self.packs = self.products = 0
        self._library = torch.library.Library("tnm_pipeline", "IMPL")
        self._library.impl("pack_two_four", self._pack, "CPU")
        self._library.impl("packed_product", lambda *arguments: self.product(*arguments), "CPU")

    def close(self) -> None:
        self._library._destroy()  # as torch's own tests end a library

    def _pack(self, matrix: Tensor) -> Tensor:
        self.packs += 1
        assert matrix.is_contiguous()
        assert not matrix.shape[0] % 16
        assert not matrix.shape[1] % 16
        groups = matrix.unflatten(1, (-1, 4))
        assert int((groups != 0).sum(2).max()) <= 2, "not 2:4"
        # The places of the non-zeros, filled up with other places, in rising order.
        places = (groups == 0).int().argsort(dim=2, stable=True)[..., :2].sort(2).values
        values = groups.gather(2, places).flatten(1)
        bits = (places[..., 0] + 4 * places[..., 1]).unflatten(1, (-1, 4))
        words = (bits << torch.tensor([0, 4, 8, 12])).sum(2).to(torch.int16)
        return torch.cat([values, words.view(matrix.dtype)], 1)

    def product(self, dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        self.products += 1
        assert dense.dtype == packed.dtype
        columns = dense.shape[1]
        values, words = packed[:, : columns // 2], packed[:, columns // 2 :].contiguous().view(torch.int16).int()
        bits = (words.unsqueeze(2) >> torch.tensor([0, 4, 8, 12])).flatten(1) & 15
        places = torch.stack([bits & 3, bits >> 2], 2)
        groups = torch.zeros(*bits.shape, 4, dtype=packed.dtype).scatter_(
            2, places.long(), values.unflatten(1, (-1, 2))
        )
        return F.linear(dense, groups.flatten(1), bias)


class Layer(nn.Linear):
    """A Linear with a mask and packs, as the kernel's file says that one uses them."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, pattern: Pattern, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.register_buffer("mask", solve(self.weight, pattern))
        self.packed: PackedWeight | None = PackedWeight(2 if pattern.transposable else 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Linear's own name
        if self.packed is not None and self.packed.serves(input, self.weight, self.mask):
            return sparse_linear(input, self.weight, self.packed, self.bias)
        return F.linear(input, masked_weight(self.weight, self.mask), self.bias)

    def refresh(self, dtype: torch.dtype = torch.bfloat16) -> None:
        assert self.packed is not None
        self.packed.refresh(self.weight, self.mask, dtype)
