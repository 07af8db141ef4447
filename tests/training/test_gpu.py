"""What must be the same on a CUDA device; run with `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from tnm_pipeline.training.layers import make_sparse
from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.sparsify import Sparsifier

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_are_those_of_the_cpu(text: str, dtype: torch.dtype) -> None:
    weight = torch.randn(512, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    pattern = Pattern.parse(text)
    assert torch.equal(solve(weight.cuda(), pattern).cpu(), solve(weight, pattern))


def test_products_are_those_of_the_masked_dense_layer() -> None:
    torch.manual_seed(0)
    plain, sparse = nn.Linear(64, 32).cuda(), nn.Linear(64, 32).cuda()
    mask = solve(plain.weight, Pattern(2, 4, transposable=True))
    sparse.load_state_dict(plain.state_dict())
    make_sparse(sparse, mask)
    with torch.no_grad():
        plain.weight.mul_(mask)
    inputs = torch.randn(128, 64, device="cuda", requires_grad=True)
    again = inputs.detach().clone().requires_grad_()
    dense_output, sparse_output = plain(inputs), sparse(again)
    assert torch.equal(dense_output, sparse_output)
    dense_output.square().sum().backward()
    sparse_output.square().sum().backward()
    assert torch.equal(inputs.grad, again.grad)  # type: ignore[arg-type]  # both were just computed
    assert bool((sparse.weight.grad[~mask] != 0).any())  # type: ignore[index]  # as above


def test_a_mixed_precision_loop_ends_with_the_pattern_in_both_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", total_steps=100)
    inputs, targets = torch.randn(256, 64, device="cuda"), torch.randint(0, 10, (256,), device="cuda")
    losses = []
    for _ in range(100):
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    layers, masks = sparsifier.finalize()
    assert [row.violations for row in layers if row.pattern] == [0, 0]
    for name, mask in masks.items():
        counted = count_violations(model.get_submodule(name).get_parameter("weight"), Pattern(2, 4, transposable=True))
        assert (counted.forward, counted.transposed) == (0, 0)
        assert mask.is_cuda
