"""2:4 products on CUDA: cuSPARSELt, through torch's own operators, which nothing else here calls.

Packed once after each optimizer step, W and its transpose serve every micro-batch until the next one. A layer uses them
like this, and multiplies with its masked weight wherever they do not serve:

    if self.packed is not None and self.packed.serves(input, self.weight, self.mask):
        return sparse_linear(input, self.weight, self.packed, self.bias)

Shape legend: T = tokens (all leading dimensions of the input), O = out features, I = in features,
S = what cuSPARSELt stores of a row: its kept half and where it was.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tnm_pipeline.training.kernels.prepare import masked_cast, masked_cast_both

_TOKENS = 8  # cuSPARSELt takes dense operands of 16-bit values in multiples of 8 rows, and at addresses of 16 bytes
_ALIGNMENT = 16

# Not `torch.library.custom_op`: its first call imports the compiler, two seconds for everybody who does not compile.
_library = torch.library.Library("tnm_pipeline", "FRAGMENT")
_library.define("pack_two_four(Tensor matrix) -> Tensor")
_library.define("packed_product(Tensor dense, Tensor packed, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "pack_two_four", "CUDA")
def _pack_on_cuda(matrix: Tensor) -> Tensor:
    """(O, I) with at most two non-zeros in every four of a row -> (O, S)."""
    packed: Tensor = torch.ops.aten._cslt_compress(matrix)
    return packed


@torch.library.impl(_library, "packed_product", "CUDA")
def _product_on_cuda(dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """(T, I) times the transpose of what was packed, plus (O,) -> (T, O), contiguous."""
    tokens = dense.shape[0]
    if tokens == 0:
        return dense.new_empty(0, packed.shape[0])
    # Of a transposed operand cuSPARSELt is told that what it transposes is contiguous, unchecked.
    dense = dense.contiguous()
    if tokens % _TOKENS:
        dense = F.pad(dense, (0, 0, 0, -tokens % _TOKENS))
    if dense.data_ptr() % _ALIGNMENT:
        dense = dense.clone()
    product: Tensor = torch.ops.aten._cslt_sparse_mm(packed, dense.t(), bias=bias, transpose_result=True)
    return product[:tokens]


def _fake_product(dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return dense.new_empty(dense.shape[0], packed.shape[0])


torch.library.register_fake("tnm_pipeline::packed_product", _fake_product, lib=_library)


class PackedWeight:
    """A layer's masked 2:4 weight as the sparse products read it: what is packed, and of which values.

    It belongs into a plain attribute of the layer. Packs are made from the weight and its mask at any time, so they are
    in no checkpoint, and a copy of this object, by `deepcopy` or pickle, is empty: it serves nothing until refreshed.

    Call `refresh` after every optimizer step. Weights that change in between (`load_state_dict`, an edit in place) are
    noticed and packed anew, except in compiled code and where they are written through `weight.data`: refresh then.

    Args:
        sparse_products: 2: forward and input gradient, for which W^T must be 2:4 too; 1: forward; 0: none, and what is
            kept is the masked weight in the format of the products, which spares every micro-batch making it.

    Attributes:
        sparse_products: as above; a change takes effect at the next `refresh`.
        forward: (O, S), W packed, or (O, I), W masked; None: empty.
        backward: (I, S), W^T packed, or (O, I), W masked; None: empty.
        asked: tokens and format of the last training pass that an empty pack was asked for; None: none yet.
    """

    def __init__(self, sparse_products: Literal[0, 1, 2]) -> None:
        self.sparse_products: Literal[0, 1, 2] = sparse_products
        self.forward: Tensor | None = None
        self.backward: Tensor | None = None
        self.asked: tuple[int, torch.dtype | None] | None = None
        self._packed_of: tuple[int, ...] = ()

    def refresh(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        """Pack the weight as it is.

        Args:
            weight: (O, I), floating; for sparse products on a CUDA device, O and I multiples of 16.
            mask: (O, I) bool that holds 2:4 for each product that is sparse.
            dtype: that the products are in, float16 or bfloat16.
        """
        # Packs made in inference mode could not be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            pack = torch.ops.tnm_pipeline.pack_two_four
            if self.sparse_products == 2:
                cast, transposed = masked_cast_both(weight, mask, dtype)
                self.forward, self.backward = pack(cast), pack(transposed)
            else:
                self.backward = masked_cast(weight, mask, dtype)
                self.forward = pack(self.backward) if self.sparse_products else self.backward
            self._packed_of = _state_of(weight, mask)

    def invalidate(self) -> None:
        """Empty it: the layer multiplies with its masked weight until the next `refresh`."""
        self.forward = self.backward = None

    def serves(self, input: Tensor, weight: Tensor, mask: Tensor) -> bool:  # noqa: A002  # Linear's own name
        """Whether the sparse product may stand in for the masked one now; packs anew what was changed.

        It does not without gradients, where other weights come and go (averages, checkpoints under test), nor in a
        format other than the packed one, nor on another device.

        Args:
            input: (..., I), of the layer.
            weight: (O, I), of the layer.
            mask: (O, I) bool, of the layer.
        """
        if not torch.is_grad_enabled():
            return False
        dtype = product_dtype(input, weight)
        if self.forward is None:
            self.asked = (input.numel() // input.shape[-1], dtype)
            return False
        if dtype != self.forward.dtype or input.device != self.forward.device:
            return False
        # Compiled code cannot look at versions; it is in the hands of whoever calls `refresh`.
        if not torch.compiler.is_compiling() and self._packed_of != _state_of(weight, mask):
            self.refresh(weight, mask, self.forward.dtype)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return vars(PackedWeight(self.sparse_products))


def _state_of(weight: Tensor, mask: Tensor) -> tuple[int, ...]:
    """Changes whenever either is written to in place, or replaced."""
    return weight.data_ptr(), weight._version, mask.data_ptr(), mask._version


def product_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:  # noqa: A002  # Linear's own name
    """The format in which a Linear would multiply, autocast considered; None: it would refuse to."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype if input.dtype == weight.dtype else None


def sparse_linear(input: Tensor, weight: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:  # noqa: A002  # as above
    """`linear` with what is packed; the weight gets the whole, dense, weight gradient.

    The contract is `linear(input, masked_weight(weight, mask), bias)` under the same autocast, up to rounding.

    Args:
        input: (..., I), floating.
        weight: (O, I), what the optimizer steps; only its gradient is of use here.
        packed: serves this input.
        bias: (O,), floating, or None.

    Returns:
        (..., O), in the format that was packed.
    """
    assert packed.forward is not None, "ask `serves` first"
    rows = input.to(packed.forward.dtype).reshape(-1, input.shape[-1])
    output: Tensor = _PackedLinear.apply(rows, weight, bias, packed.forward, packed.backward, packed.sparse_products)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return output.reshape(*input.shape[:-1], output.shape[-1])


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        backward: Tensor,
        sparse_products: int,
    ) -> Tensor:
        ctx.save_for_backward(rows, backward)
        ctx.sparse_products = sparse_products
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = None if bias is None else bias.detach().to(rows.dtype).contiguous()
        product = torch.ops.tnm_pipeline.packed_product if sparse_products else F.linear
        output: Tensor = product(rows, packed, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names of arguments
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, backward = ctx.saved_tensors
        gradient = gradients[0]
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            product = torch.ops.tnm_pipeline.packed_product
            of_input = product(gradient, backward, None) if ctx.sparse_products == 2 else gradient @ backward
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.t() @ rows).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return of_input, of_weight, of_bias, None, None, None
