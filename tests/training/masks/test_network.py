"""Selection networks by the zero-one principle: what sorts every 0/1 input sorts every input."""

from itertools import product

import numpy as np
import pytest

from tnm_pipeline.training.masks.exact.network import selection_network


def run(values: np.ndarray, m: int, ranks: frozenset[int]) -> np.ndarray:
    """Values (inputs, M) after the network; results that nobody reads become garbage."""
    wires = [values[:, wire].copy() for wire in range(m)]
    garbage = np.full(len(values), -7)
    for high, low, keeps_high, keeps_low in selection_network(m, ranks):
        larger, smaller = np.maximum(wires[high], wires[low]), np.minimum(wires[high], wires[low])
        wires[high] = larger if keeps_high else garbage
        wires[low] = smaller if keeps_low else garbage
    return np.stack(wires, axis=1)


@pytest.mark.parametrize("m", range(2, 13))
def test_two_neighbouring_ranks_of_every_zero_one_input(m: int) -> None:
    inputs = np.array(list(product((0, 1), repeat=m)))
    ordered = -np.sort(-inputs, axis=1)
    for n in range(1, m):
        selected = run(inputs, m, frozenset((n - 1, n)))
        assert np.array_equal(selected[:, n - 1 : n + 1], ordered[:, n - 1 : n + 1])


@pytest.mark.parametrize("m", [16, 24, 31, 32])
def test_one_and_all_ranks_of_random_inputs(m: int) -> None:
    inputs = np.random.default_rng(m).integers(0, 40, (2000, m))
    ordered = -np.sort(-inputs, axis=1)
    assert np.array_equal(run(inputs, m, frozenset(range(m))), ordered)
    for rank in (0, m // 2, m - 1):
        assert np.array_equal(run(inputs, m, frozenset((rank,)))[:, rank], ordered[:, rank])


def test_steps_that_nobody_reads_are_left_out() -> None:
    def operations(m: int, ranks: frozenset[int]) -> int:
        return sum(step.keeps_high + step.keeps_low for step in selection_network(m, ranks))

    assert operations(8, frozenset((3, 4))) == 28
    assert operations(32, frozenset((15, 16))) == 284
    assert operations(8, frozenset(range(8))) == 38
