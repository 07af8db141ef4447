"""Masks of CUDA tensors are the CPU's, bit for bit.

Run on a GPU with `pytest -m gpu`. Without one, Triton's interpreter runs the same kernels on the CPU where Triton is
installed; run as a script under it, this file compares small matrices of one pattern.
"""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.masks.exact import cuda
from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ("2:4-T", "1:4-T", "2:3-T", "2:8-T", "4:8-T", "8:16-T", "16:32-T", "2:4", "4:8", "2:3")
KINDS = ("gaussian", "half", "bfloat16", "ties", "sparse", "zeros", "denormal", "tiny", "huge", "strided", "transposed")
BAD = ((float("nan"), 0, 0), (float("inf"), -1, -1), (-float("inf"), -1, 0))


def weights(kind: str, rows: int, columns: int) -> Tensor:
    g = torch.Generator().manual_seed(rows + columns)
    gaussian = torch.randn(rows, columns, generator=g)
    match kind:
        case "half":
            return gaussian.half()
        case "bfloat16":
            return gaussian.bfloat16()
        case "ties":
            return torch.randint(-2, 3, (rows, columns), generator=g).float()
        case "sparse":
            return gaussian * (torch.rand(rows, columns, generator=g) > 0.9)
        case "zeros":
            return torch.zeros(rows, columns)
        case "denormal":
            return gaussian * 1e-41
        case "tiny":
            return gaussian * 10.0 ** torch.randint(-40, -10, (rows, columns), generator=g).double().float()
        case "huge":
            return gaussian * 5e37  # sums of eight overflow
        case "strided":
            return gaussian.repeat(1, 2)[:, ::2]
        case "transposed":
            return torch.randn(columns, rows, generator=g).T
        case _:
            return gaussian


def small_shape(pattern: Pattern) -> tuple[int, int]:
    """Several programs of the pattern's kernel and blocks cut by both edges, but few enough for the interpreter."""
    swept = pattern.transposable and (pattern.n, pattern.m) != (2, 4)
    return (pattern.m + 3, 40 + pattern.m // 2) if swept else (9, 523)


def compare_under_the_interpreter(text: str) -> None:
    """Every kind of small matrix, and that NaN and Inf are found in any corner."""
    pattern = Pattern.parse(text)
    shape = small_shape(pattern)
    kinds, bads = (KINDS, BAD) if pattern.m <= 8 else (("gaussian", "bfloat16"), BAD[1:2])  # large blocks take seconds
    for kind in kinds:
        matrix = weights(kind, *shape)
        mask, finite = cuda.solve_by_kernels(matrix, pattern)
        assert finite, kind
        assert mask.is_contiguous(), kind
        assert torch.equal(mask, solve_on_cpu(matrix, pattern)[0]), kind
    for bad, row, column in bads:
        matrix = weights("gaussian", *shape)
        matrix[row, column] = bad
        assert not cuda.solve_by_kernels(matrix, pattern)[1], (bad, row, column)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: its interpreter cannot be run")
@pytest.mark.parametrize("text", PATTERNS)
def test_kernels_find_the_masks_of_the_cpu_under_the_interpreter(text: str) -> None:
    """In a process of its own: Triton decides when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__, text], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_triton_the_cpu_solves_and_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda._has_triton.cache_clear()
    matrix, pattern = weights("gaussian", 8, 12), Pattern(2, 4, transposable=True)
    expected, _ = solve_on_cpu(matrix, pattern)
    caplog.clear()  # of the line that says so where the kernel had to be compiled
    with caplog.at_level(logging.WARNING):
        masks = [cuda.solve_on_cuda(matrix, pattern) for _ in range(2)]
    cuda._has_triton.cache_clear()
    assert all(torch.equal(mask, expected) for mask, _ in masks)
    assert [record.message.endswith("install triton for the GPU kernels") for record in caplog.records] == [True]


@pytest.mark.parametrize("shape", [(16, 24), (13, 700)])
def test_blocks_left_over_are_solved_in_their_places(shape: tuple[int, int]) -> None:
    matrix, pattern = weights("ties", *shape), Pattern(4, 8, transposable=True)
    strips, groups = -(-shape[0] // 8), -(-shape[1] // 8)
    mask = torch.zeros(strips * 8, groups * 8, dtype=torch.bool)
    places = torch.tensor([(strip, group) for strip, group in product(range(strips), range(groups)) if group % 3])
    assert cuda._solve_left(matrix, pattern, places, mask)
    left = (torch.arange(shape[1]) // 8 % 3 != 0).expand(shape)
    assert torch.equal(mask[: shape[0], : shape[1]], solve_on_cpu(matrix, pattern)[0] & left)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", PATTERNS)
def test_masks_are_those_of_the_cpu(text: str, kind: str) -> None:
    pattern = Pattern.parse(text)
    for shape in ((256, 768), (131, 1001), (1, 1), (3, 4096), (520, 5)):
        matrix = weights(kind, *shape)
        on_cuda = matrix.cuda()
        if kind in ("strided", "transposed"):
            on_cuda = torch.empty(matrix.untyped_storage().size() // 4, device="cuda").as_strided(
                shape, matrix.stride()
            )
            on_cuda.copy_(matrix)
        mask, finite = cuda.solve_on_cuda(on_cuda, pattern)
        assert finite
        assert mask.is_contiguous()
        assert torch.equal(mask.cpu(), solve_on_cpu(matrix, pattern)[0]), shape


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["4:8-T", "16:32-T"])
def test_the_sweeps_alone_prove_every_gaussian_block(text: str) -> None:
    from tnm_pipeline.training.masks.exact.cuda_transposable import prove_blocks

    pattern = Pattern.parse(text)
    mask, proven = prove_blocks(weights("gaussian", 512, 512).cuda(), pattern.n, pattern.m)
    assert bool(proven.all())
    assert torch.equal(mask.cpu(), solve_on_cpu(weights("gaussian", 512, 512), pattern)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "2:4"])
def test_a_weight_that_is_not_finite_is_refused(text: str, bad: float) -> None:
    weight = torch.ones(100, 1000, device="cuda")
    weight[99, 998] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf .* the first at \[99, 998\]"):
        solve(weight, Pattern.parse(text))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "2:4"])
def test_solve_takes_any_weight_and_may_be_compiled(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(24, 40, 3, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(solve(weight.to("cuda", dtype), pattern).cpu(), solve(weight.to(dtype), pattern))
    compiled = torch.compile(lambda w: w * solve(w, pattern), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight.cuda()).cpu(), weight * solve(weight, pattern))


@pytest.mark.gpu
def test_another_stream_and_another_device_are_kept_to() -> None:
    matrix, pattern = weights("gaussian", 256, 256), Pattern(4, 8, transposable=True)
    expected = solve_on_cpu(matrix, pattern)[0]
    on_cuda = matrix.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mask, _ = cuda.solve_on_cuda(on_cuda, pattern)
        assert torch.equal(mask.cpu(), expected)
    for device in range(1, torch.cuda.device_count()):
        mask, _ = cuda.solve_on_cuda(matrix.to(f"cuda:{device}"), pattern)
        assert mask.device.index == device
        assert torch.equal(mask.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "2:4"])
def test_a_matrix_of_more_than_two_to_the_31_weights(text: str) -> None:
    if torch.cuda.mem_get_info()[0] < 32e9:
        pytest.skip("needs 32 GB of free GPU memory")
    pattern = Pattern.parse(text)
    matrix = torch.randn(70_000, 32_768, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask, finite = cuda.solve_on_cuda(matrix, pattern)
    assert finite
    assert torch.equal(mask[-64:].cpu(), solve_on_cpu(matrix[-64:].cpu(), pattern)[0])


if __name__ == "__main__":
    compare_under_the_interpreter(sys.argv[1])
