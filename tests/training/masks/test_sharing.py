"""Shares cover everything once, whatever the number of threads."""

from collections.abc import Iterator

import pytest
import torch

from tnm_pipeline.training.masks.sharing import share_out


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [0, 1, 1 << 16, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_shares_follow_each_other_without_gaps(threads: int, count: int, items: int) -> None:
    shares = sorted(share_out(lambda first, last: (first, last), count, items))
    assert [first for first, _ in shares] == [0, *(last for _, last in shares[:-1])]
    assert shares[-1][1] == count
    assert len(shares) <= 4 * threads


def test_an_error_in_a_share_reaches_the_caller(threads: int) -> None:
    def work(first: int, last: int) -> None:
        raise ArithmeticError(f"{threads} threads, {first} to {last}")

    with pytest.raises(ArithmeticError, match=f"{threads} threads"):
        share_out(work, 1000, 1 << 20)
