"""The one entry: every solver through it, against brute force and each other, and what it refuses."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.layout import from_blocks, to_blocks
from tnm_pipeline.training.masks import Solver, count_violations, solve
from tnm_pipeline.training.masks.bound import upper_bound
from tnm_pipeline.training.pattern import Pattern

TRANSPOSABLE = Pattern(2, 4, transposable=True)


def kept_sum(weight: Tensor, mask: Tensor) -> float:
    return float((weight.double().abs() * mask).sum())


@pytest.mark.parametrize("text", ["2:4-T", "1:4-T", "3:4-T", "2:8-T", "4:8-T", "2:3-T"])
def test_every_solver_holds_the_pattern_and_keeps_what_it_promises(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(2 * pattern.m, 3 * pattern.m, generator=torch.Generator().manual_seed(1))
    exact, flow, greedy = (solve(weight, pattern, solver) for solver in ("exact", "flow", "greedy"))
    for mask in (exact, flow, greedy):
        assert count_violations(mask, pattern).of(pattern) == 0
    assert int(exact.sum()) == int(flow.sum()) == weight.numel() * pattern.n // pattern.m
    assert kept_sum(weight, exact) == pytest.approx(kept_sum(weight, flow), rel=1e-9)
    bound = upper_bound(weight, pattern)
    assert 0.5 * bound < kept_sum(weight, greedy) <= bound
    assert kept_sum(weight, exact) <= bound


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 1), (3, 64), (64, 2), (8, 8, 3, 3), (5, 6, 1, 3), (0, 4)])
def test_the_mask_holds_the_pattern_for_any_shape(text: str, shape: tuple[int, ...]) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = solve(weight, pattern)
    assert mask.shape == weight.shape
    assert count_violations(mask, pattern).of(pattern) == 0


def test_groups_of_a_convolution_run_along_input_channels() -> None:
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    mask = solve(weight, Pattern(2, 4, transposable=True))
    for y, x in product(range(3), range(3)):
        tile = mask[:, :, y, x]
        assert bool((tile.reshape(8, 2, 4).sum(2) == 2).all())
        assert bool((tile.reshape(2, 4, 8).sum(1) == 2).all())


def test_a_mask_of_sixteen_consecutive_weights_is_not_transposable() -> None:
    """Folding 16 weights of one row into a 'block' leaves W 2:4 and its transpose broken."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(4)).abs()
    blocks = weight.reshape(-1, 4, 4)
    folded = to_blocks(solve(from_blocks(blocks, 4, 4 * len(blocks)), TRANSPOSABLE), 4).reshape(64, 64)
    violations = count_violations(folded, Pattern(2, 4))
    assert violations.forward == 0
    assert violations.transposed > 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_stride(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    pattern = Pattern(2, 4, transposable=True)
    assert torch.equal(solve(weight, pattern), solve(weight.float(), pattern))
    strided = weight.repeat(1, 2)[:, ::2]
    assert torch.equal(solve(strided, pattern), solve(strided.contiguous(), pattern))


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_a_large_layer_equals_its_halves(solver: Solver) -> None:
    """A layer of more blocks than are solved at once, and of more than one thread's share."""
    weight = torch.randn(1536, 1536, generator=torch.Generator().manual_seed(6))
    assert weight.numel() // 16 > 1 << 17
    halves = [solve(half, TRANSPOSABLE, solver) for half in torch.split(weight, 768)]
    assert torch.equal(solve(weight, TRANSPOSABLE, solver), torch.cat(halves))


def test_importance_decides_in_place_of_the_weight() -> None:
    g = torch.Generator().manual_seed(7)
    weight, importance = torch.randn(8, 8, 3, 3, generator=g), torch.rand(8, 8, 3, 3, generator=g)
    mask = solve(weight, TRANSPOSABLE, importance=importance)
    assert torch.equal(mask, solve(importance, TRANSPOSABLE))
    assert not torch.equal(mask, solve(weight, TRANSPOSABLE))


def test_importance_must_fit_the_weight_and_not_be_negative() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 8\), the weight \(4, 4\)"):
        solve(torch.ones(4, 4), TRANSPOSABLE, importance=torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"pass its abs\(\)"):
        solve(torch.ones(4, 4), TRANSPOSABLE, importance=-torch.ones(4, 4))
    with pytest.raises(ValueError, match="NaN or Inf"):
        solve(torch.ones(4, 4), TRANSPOSABLE, importance=torch.full((4, 4), torch.nan))


def test_it_is_one_operator_of_the_graph_under_torch_compile() -> None:
    targets: list[str] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(8), requires_grad=True)
    compiled = torch.compile(lambda w: w * solve(w, TRANSPOSABLE), backend=keep_graph, fullgraph=True)
    assert torch.equal(compiled(weight), weight * solve(weight, TRANSPOSABLE))
    assert sum("solve_mask" in target for target in targets) == 1


def test_the_operator_is_well_formed() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(9))
    torch.library.opcheck(torch.ops.tnm_pipeline.solve_mask.default, (weight, 2, 4, True, "exact"))


def test_a_weight_that_needs_gradients_gives_a_plain_mask() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    mask = solve(weight, TRANSPOSABLE)
    assert mask.dtype == torch.bool
    assert not mask.requires_grad


@pytest.mark.parametrize("solver", ["exact", "greedy", "flow"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_place(solver: Solver, bad: float) -> None:
    weight = torch.ones(4, 4, 3, 3)
    weight[1, 2, 0, 1] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf entries \(1 of 144, the first at \[1, 2, 0, 1\]\)"):
        solve(weight, TRANSPOSABLE, solver)


@pytest.mark.parametrize("solver", ["exact", "greedy", "flow"])
@pytest.mark.parametrize("pattern", [TRANSPOSABLE, Pattern(2, 4)], ids=str)
def test_a_weight_beyond_float32_is_refused_with_the_place(solver: Solver, pattern: Pattern) -> None:
    weight = torch.ones(4, 8, dtype=torch.float64)
    weight[2, 5] = -1e300
    with pytest.raises(ValueError, match=r"entries beyond float32 \(1 of 32, the first at \[2, 5\]\): divide all"):
        solve(weight, pattern, solver)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="exact, greedy, flow"):
        solve(torch.ones(4, 4), Pattern(2, 4), "magic")  # type: ignore[arg-type]  # what a careless caller does
