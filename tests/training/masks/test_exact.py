"""The exact solver: optimal on every kind of weight, whatever the shape, strides, dtype and number of threads.

Two oracles that share nothing with the solver: networkx, and the theorem that a mask is optimal if and only if no
cycle of exchanges gains anything (Ahuja, Magnanti, Orlin, Network Flows, 9.1).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from tnm_pipeline.training.layout import pad_to_multiple, to_blocks
from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.masks.exact.paths import finish_block
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.pattern import Pattern

NAMED = ("2:4-T", "1:4-T", "4:8-T", "2:8-T", "1:8-T", "8:16-T", "16:32-T")
OTHERS = ("1:2-T", "2:3-T", "3:6-T", "5:7-T", "5:11-T", "7:24-T", "31:32-T")

Draw = Callable[[torch.Generator, int, int], Tensor]


def gaussian(g: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=g)


KINDS: dict[str, Draw] = {
    "gaussian": gaussian,
    "heavy tails": lambda g, r, c: gaussian(g, r, c) / torch.rand(r, c, generator=g).clamp_min(1e-4) ** 2,
    "scaled rows and columns": lambda g, r, c: (
        gaussian(g, r, c)
        * torch.exp2(-6 * torch.rand(r, 1, generator=g))
        * torch.exp2(-6 * torch.rand(1, c, generator=g))
    ),
    "ties": lambda g, r, c: torch.randint(-2, 3, (r, c), generator=g).float(),
    "90% zeros": lambda g, r, c: gaussian(g, r, c) * (torch.rand(r, c, generator=g) > 0.9),
    "constant": lambda _, r, c: torch.full((r, c), -1.5),
    "float16": lambda g, r, c: gaussian(g, r, c).half(),
    "float16 denormals": lambda g, r, c: (gaussian(g, r, c) * 1e-6).half(),
    "bfloat16": lambda g, r, c: gaussian(g, r, c).bfloat16(),
    "denormals": lambda g, r, c: gaussian(g, r, c) * 1e-41,
    "huge": lambda g, r, c: gaussian(g, r, c).clamp(-3, 3) * 1e38,
}


def no_exchange_gains(blocks: Tensor, mask: Tensor) -> Tensor:
    """Whether each mask is optimal among those with its row and column sums: (B) bool from (B, M, M) float64 and bool.

    An exchange of row r gives up column c for column d and loses a[r, c] - a[r, d]. A cycle of exchanges over the
    columns keeps all sums; Floyd and Warshall find the cheapest one through every column.
    """
    _, m, _ = blocks.shape
    exponent = torch.frexp(blocks.amax((1, 2), keepdim=True)).exponent
    blocks = torch.ldexp(
        blocks, -exponent
    )  # exact, where dividing would round: a cycle of -1e-17 grows with every step
    never = torch.tensor(torch.inf, dtype=torch.float64)
    loss = torch.full_like(blocks, torch.inf)
    for row in range(m):
        kept = mask[:, row]
        given_up = torch.where(kept, blocks[:, row], never)[:, :, None]
        taken = torch.where(kept, -never, blocks[:, row])[:, None, :]
        loss = torch.minimum(loss, given_up - taken)
    for via in range(m):
        loss = torch.minimum(loss, loss[:, :, via : via + 1] + loss[:, via : via + 1, :])
    return loss.diagonal(dim1=1, dim2=2).amin(1) > -1e-12


def every_kind(pattern: Pattern, blocks_each: int, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(M * 4, ...) matrices with that many blocks of each kind of weight."""
    g = torch.Generator().manual_seed(seed)
    for name, draw in KINDS.items():
        yield name, draw(g, pattern.m * 4, pattern.m * (blocks_each // 4))


def solved(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Blocks of abs(matrix), float64, and their masks."""
    mask, finite = solve_on_cpu(matrix, pattern)
    assert finite
    return to_blocks(matrix.double().abs(), pattern.m), to_blocks(mask, pattern.m)


def kept(blocks: Tensor, mask: Tensor) -> Tensor:
    return (blocks * mask).sum((1, 2))


def test_the_oracle_tells_greedy_from_optimal() -> None:
    blocks = torch.randn(200, 8, 8, generator=torch.Generator().manual_seed(0)).abs()
    blocks = blocks.double()
    best = kept(blocks, solve_flow(blocks, 4))
    greedy = solve_greedy(blocks, 4, complete=True)
    optimal = no_exchange_gains(blocks, greedy)
    assert 0 < int(optimal.sum()) < 50
    assert torch.equal(optimal, torch.isclose(kept(blocks, greedy), best, rtol=1e-11))
    assert bool(no_exchange_gains(blocks, solve_flow(blocks, 4)).all())


@pytest.mark.parametrize("text", NAMED + OTHERS)
def test_no_exchange_gains_anything(text: str) -> None:
    pattern = Pattern.parse(text)
    for name, matrix in every_kind(pattern, 220 if text in NAMED else 40):
        if text in OTHERS and matrix.dtype != torch.float32:
            continue  # reading other formats is common to all patterns, and each takes seconds to compile
        blocks, mask = solved(matrix, pattern)
        assert bool((mask.sum(1) == pattern.n).all()), name
        assert bool((mask.sum(2) == pattern.n).all()), name
        optimal = no_exchange_gains(blocks, mask)
        if text == "2:4-T":  # sums of float32: compare what is kept where the masks differ
            best = kept(blocks, solve_flow(blocks[~optimal], 2)) if not bool(optimal.all()) else None
            assert best is None or bool((kept(blocks[~optimal], mask[~optimal]) >= best * (1 - 2**-22)).all()), name
        else:
            assert bool(optimal.all()), name


@pytest.mark.parametrize("text", NAMED)
def test_equal_to_min_cost_flow(text: str) -> None:
    pattern = Pattern.parse(text)
    for name, matrix in every_kind(pattern, 8, seed=1):
        blocks, mask = solved(matrix, pattern)
        best = kept(blocks, solve_flow(blocks, pattern.n))
        torch.testing.assert_close(
            kept(blocks, mask), best, rtol=2**-22 if text == "2:4-T" else 1e-11, atol=0, msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("text", [*NAMED, "3:6-T", "5:11-T"])
def test_equal_to_min_cost_flow_on_two_thousand_blocks(text: str) -> None:
    pattern = Pattern.parse(text)
    count = 0
    for name, matrix in every_kind(pattern, 200, seed=2):
        blocks, mask = solved(matrix, pattern)
        best = kept(blocks, solve_flow(blocks, pattern.n))
        torch.testing.assert_close(
            kept(blocks, mask), best, rtol=2**-22 if text == "2:4-T" else 1e-11, atol=0, msg=name
        )
        count += len(blocks)
    assert count >= 2000


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(("2:4-T", "1:4-T", "4:8-T", "3:6-T")), st.data())
def test_on_adversarial_integers(text: str, data: st.DataObject) -> None:
    pattern = Pattern.parse(text)
    size = pattern.m**2
    values = data.draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size))
    matrix = torch.tensor(values, dtype=torch.float32).reshape(pattern.m, pattern.m)
    blocks, mask = solved(matrix, pattern)
    assert bool((mask.sum(1) == pattern.n).all())
    assert bool((mask.sum(2) == pattern.n).all())
    assert bool(no_exchange_gains(blocks, mask).all())


@pytest.mark.parametrize("m", [4, 8, 15, 32])
def test_paths_are_optimal_from_any_start(m: int) -> None:
    n = m // 2

    @njit
    def finish(weights: np.ndarray, prices: np.ndarray, rows: np.ndarray, scratch: np.ndarray) -> None:
        finish_block(weights, prices, rows, scratch[0], scratch[1], scratch[2], n, m)

    rng = np.random.default_rng(m)
    for trial in range(40):
        weights = rng.integers(0, 2 ** (49 if trial % 2 else 3), m * m)
        prices = rng.integers(-(2**48), 2**48, m) if trial % 3 else np.zeros(m, np.int64)
        worth = weights.reshape(m, m) - prices
        bars = rng.permuted(worth, axis=1)[:, :1]  # rows keep too few or too many, but always their best
        rows = ((worth > bars) << np.arange(m)).sum(1)
        finish(weights, prices, rows, np.empty((3, m), np.int64))
        mask = torch.from_numpy((rows[:, None] >> np.arange(m)) & 1).bool().reshape(1, m, m)
        assert bool((mask.sum(1) == n).all())
        assert bool((mask.sum(2) == n).all())
        assert bool(no_exchange_gains(torch.from_numpy(weights).double().reshape(1, m, m), mask).all())


def rowwise_by_sorting(matrix: Tensor, pattern: Pattern) -> Tensor:
    padded = pad_to_multiple(matrix.float().abs(), pattern.m)
    groups = padded.reshape(-1, pattern.m)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order, True).reshape(padded.shape)
    return mask[: matrix.shape[0], : matrix.shape[1]]


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "5:12", "31:32"])
def test_rowwise_equals_a_stable_sort(text: str) -> None:
    pattern = Pattern.parse(text)
    g = torch.Generator().manual_seed(3)
    for name, draw in KINDS.items():
        matrix = draw(g, 3, 70 * pattern.m + 1)
        mask, finite = solve_on_cpu(matrix, pattern)
        assert finite
        assert torch.equal(mask, rowwise_by_sorting(matrix, pattern)), name


def layouts() -> Iterator[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(4)
    whole = gaussian(g, 200, 1200)
    yield "rows further apart than long", whole[:, 3:1100]
    yield "every second column", whole[:, ::2]
    yield "every third row, from an offset", whole[5::3]
    yield "transposed", whole.t()
    yield "one row repeated", whole[:1].expand(40, 1200)
    yield "one column repeated", whole[:, :1].expand(200, 90)
    yield "smaller than a block", whole[:3, :2]
    yield "one weight", whole[:1, :1]
    yield "one row", whole[:1]
    yield "one column", whole[:, :1]
    yield "bfloat16, sliced", whole.bfloat16()[1:, 1:]
    yield "float16, transposed", whole.half().t()[7:]


@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "8:16-T", "16:32-T", "2:4", "5:12"])
def test_strides_and_edges_give_the_mask_of_a_padded_copy(text: str) -> None:
    pattern = Pattern.parse(text)
    for name, matrix in layouts():
        rows, columns = matrix.shape
        width = 32 * pattern.m  # a multiple of a tile, so that nothing is cut
        padded = torch.zeros(-(-rows // pattern.m) * pattern.m, -(-columns // width) * width, dtype=matrix.dtype)
        padded[:rows, :columns] = matrix
        mask, _ = solve_on_cpu(matrix, pattern)
        assert mask.shape == matrix.shape
        assert mask.is_contiguous()
        assert torch.equal(mask, solve_on_cpu(padded, pattern)[0][:rows, :columns]), name


@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "2:4"])
def test_any_number_of_threads_gives_the_same_mask(text: str) -> None:
    pattern = Pattern.parse(text)
    matrix = torch.randint(-3, 4, (1000, 1100), generator=torch.Generator().manual_seed(5)).float()
    threads = torch.get_num_threads()
    try:
        masks = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            masks.append(solve_on_cpu(matrix, pattern)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    pattern = Pattern.parse("4:8-T")
    g = torch.Generator().manual_seed(6)
    matrices = [gaussian(g, 256, 700) for _ in range(8)]
    alone = [solve_on_cpu(matrix, pattern)[0] for matrix in matrices]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda matrix: solve_on_cpu(matrix, pattern)[0], matrices))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (9, 100), (32, 300)])
def test_one_entry_that_is_not_finite_is_seen(
    text: str, dtype: torch.dtype, bad: float, place: tuple[int, int]
) -> None:
    matrix = gaussian(torch.Generator().manual_seed(7), 33, 301).to(dtype)
    pattern = Pattern.parse(text)
    assert solve_on_cpu(matrix, pattern)[1]
    matrix[place] = bad
    assert not solve_on_cpu(matrix, pattern)[1]


def test_the_largest_finite_weights_are_finite() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrix = torch.full((8, 64), torch.finfo(dtype).max, dtype=dtype)
        for text in ("2:4-T", "4:8-T", "2:4"):
            mask, finite = solve_on_cpu(matrix, Pattern.parse(text))
            assert finite
            assert float(mask.double().mean()) == 0.5
