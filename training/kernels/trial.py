"""Both ways to multiply with a layer's weight, side by side: are they equal, and which is faster?

Shape legend: T = tokens, O = out features, I = in features.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.kernels.semi_structured import PackedWeight, sparse_linear
from tnm_pipeline.training.timing import Comparison, interleave

_ROUNDS = 15


class Trial:
    """Random inputs and output gradients for one weight. Neither the weight nor any random state is changed.

    Each way returns the output (T, O) and the gradients of the input (T, I) and of the weight (O, I).

    Args:
        weight: (O, I), floating, on a CUDA device.
        mask: (O, I) bool.
        tokens: T.
        dtype: that the products are in, float16 or bfloat16.
        sparse_products: 2 where the transpose of the mask is 2:4 too, else 1.

    Raises:
        RuntimeError: the device or its library refuses to pack.
    """

    def __init__(
        self, weight: Tensor, mask: Tensor, tokens: int, dtype: torch.dtype, sparse_products: Literal[1, 2]
    ) -> None:
        generator = torch.Generator(weight.device).manual_seed(0)

        def random(features: int) -> Tensor:
            return torch.randn(tokens, features, device=weight.device, dtype=dtype, generator=generator)

        self._rows = random(weight.shape[1]).requires_grad_()
        self._gradient = random(weight.shape[0])
        self._weight = weight.detach().requires_grad_()  # same memory, gradients of its own
        self._mask = mask
        self._dtype = dtype
        self._prepared = PackedWeight(0)
        self._packed = PackedWeight(sparse_products)
        self.prepare()
        self.pack()

    def prepare(self) -> None:
        """What an optimizer step costs if products are masked."""
        self._prepared.refresh(self._weight, self._mask, self._dtype)

    def pack(self) -> None:
        """What an optimizer step costs if products are sparse."""
        self._packed.refresh(self._weight, self._mask, self._dtype)

    def masked(self) -> tuple[Tensor, ...]:
        """Masked products of a weight that was prepared."""
        return self._with_gradients(lambda: sparse_linear(self._rows, self._weight, self._prepared, None))

    def sparse(self) -> tuple[Tensor, ...]:
        """Sparse products of a weight that was packed."""
        return self._with_gradients(lambda: sparse_linear(self._rows, self._weight, self._packed, None))

    def emulated(self) -> tuple[Tensor, ...]:
        """The contract of both: the masked kernel, as under autocast."""
        return self._with_gradients(
            lambda: F.linear(self._rows, masked_weight(self._weight, self._mask).to(self._dtype))
        )

    def dense(self) -> tuple[Tensor, ...]:
        """A plain Linear, as under autocast."""
        return self._with_gradients(lambda: F.linear(self._rows, self._weight.to(self._dtype)))

    @torch.enable_grad()
    def _with_gradients(self, way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        output = way()
        return output.detach(), *torch.autograd.grad(output, (self._rows, self._weight), self._gradient)

    def errors(self) -> tuple[float, ...]:
        """Largest difference of sparse from emulated, over the largest value: output, input and weight gradient."""
        return tuple(
            float((found - right).abs().max() / right.abs().max().clamp(min=torch.finfo(right.dtype).tiny))
            for found, right in zip(self.sparse(), self.emulated(), strict=True)
        )

    def compare(self, micro_batches: int) -> Comparison:
        """Time masked against sparse products, in turns.

        Args:
            micro_batches: of each optimizer step.
        """
        functions = {"masked": self.masked, "prepare": self.prepare, "sparse": self.sparse, "pack": self.pack}
        return Comparison.of(interleave(functions, self._weight.device, _ROUNDS), micro_batches)
