"""Masked, cast and transposed weights are what loops say; the kernel's are the same bits.

Without a GPU, Triton's interpreter runs the kernel where Triton is installed; run as a script under it, this file
compares small matrices.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.kernels.prepare import cast_by_kernel, masked_cast, masked_cast_both

FORMATS = (torch.float32, torch.float16, torch.bfloat16)
SHORT = (torch.float16, torch.bfloat16)
SHAPES = ((64, 64), (1, 1), (3, 200), (130, 67), (16, 32))


def case(rows: int, columns: int, source: torch.dtype, *, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of all magnitudes, some zero, and a mask without a pattern."""
    g = torch.Generator().manual_seed(rows * columns)
    magnitude = 10.0 ** torch.randint(-12, 5, (rows, columns), generator=g)
    weight = torch.randn(rows, columns, generator=g) * magnitude * (torch.rand(rows, columns, generator=g) > 0.1)
    if rounded:
        weight = weight.bfloat16()
    return weight.to(source), torch.rand(rows, columns, generator=g) < 0.5


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.int16)


def check_kernel(source: torch.dtype, target: torch.dtype, device: str, *, rounded: bool) -> None:
    for shape in SHAPES:
        weight, mask = case(*shape, source, rounded=rounded)
        expected = masked_cast(weight, mask, target)
        found = cast_by_kernel(weight.to(device), mask.to(device), target, transpose=True)
        found += cast_by_kernel(weight.to(device), mask.to(device), target, transpose=False)
        for one, other in zip(found, (expected, expected.t().contiguous(), expected), strict=True):
            assert one.is_contiguous()
            assert torch.equal(bits(one), bits(other)), (shape, source, target)


@pytest.mark.parametrize("target", SHORT)
@pytest.mark.parametrize("source", FORMATS)
def test_it_is_the_masked_weight_rounded_and_its_transpose(source: torch.dtype, target: torch.dtype) -> None:
    weight, mask = case(5, 12, source)
    found, transposed = masked_cast_both(weight, mask, target)
    assert found.dtype == transposed.dtype == target
    assert found.is_contiguous()
    assert transposed.is_contiguous()
    for row, column in product(range(5), range(12)):
        expected = weight[row, column].to(target) if mask[row, column] else torch.zeros((), dtype=target)
        for one in (found[row, column], transposed[column, row]):
            assert torch.equal(bits(one), bits(expected))  # a pruned weight is +0


def test_strides_do_not_matter_and_no_gradient_is_kept() -> None:
    weight, mask = case(8, 12, torch.float32)
    expected = masked_cast_both(weight, mask, torch.bfloat16)
    strided = torch.nn.Parameter(weight.t().contiguous().t())
    for one, other in zip(masked_cast_both(strided, mask.repeat(1, 2)[:, :12], torch.bfloat16), expected, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        assert not one.requires_grad


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: its interpreter cannot be run")
def test_the_kernel_writes_the_same_bits_under_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("target", SHORT)
@pytest.mark.parametrize("source", FORMATS)
def test_the_kernel_writes_the_same_bits(source: torch.dtype, target: torch.dtype) -> None:
    check_kernel(source, target, "cuda", rounded=False)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_kernel_reaches_places_beyond_31_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    weight = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones_like(weight, dtype=torch.bool)
    found, transposed = cast_by_kernel(weight, mask, torch.bfloat16, transpose=True)
    assert torch.equal(found[-64:], weight[-64:])
    assert torch.equal(transposed[-64:], weight[:, -64:].t())


if __name__ == "__main__":
    for source, target in product(FORMATS, SHORT):
        # The interpreter cuts to bfloat16 where hardware rounds: it gets weights that need neither.
        check_kernel(source, target, "cpu", rounded=target == torch.bfloat16)
