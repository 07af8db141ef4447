"""The vector language against numpy."""

from typing import Any

import numpy as np
import pytest
from numba import njit

from tnm_pipeline.training.masks.exact.simd import FLOAT32, INT16, INT32, Buffer, deinterleave, maximum, vector_op

LANES = 8


@vector_op
def part(source: Buffer, target: Buffer, m: int) -> None:
    vectors = [source.load(first, LANES) for first in range(0, m * LANES, LANES)]
    for column, vector in enumerate(deinterleave(vectors)):
        target.store(column * LANES, vector)


@vector_op
def calculate(left: Buffer, right: Buffer, results: Buffer) -> None:
    x, y = left.load(0, LANES), right.load(0, LANES)
    values = [x + y, x - y, x * 3, x & y, x | 1, x ^ y, x << 2, x >> 1, maximum(x, y), x.intrinsic("ssub.sat", y)]
    values += [x.compare(">", y).where(x, y), x.compare("==", 1 << 15).where(y, x.like(7))]
    values.append((x.to(FLOAT32) * 0.5).to(INT32).to(INT16))
    for index, value in enumerate(values):
        results.store(index * LANES, value)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 32])
def test_deinterleave_parts_by_position(m: int) -> None:
    @njit
    def run(source: Any, target: Any) -> None:
        part(source, target, m)

    source = np.arange(m * LANES, dtype=np.int16)
    target = np.empty_like(source)
    run(source, target)
    assert np.array_equal(target.reshape(m, LANES), source.reshape(LANES, m).T)


def test_arithmetic_is_that_of_int16() -> None:
    @njit
    def run(left: Any, right: Any, results: Any) -> None:
        calculate(left, right, results)

    x = np.array([0, 1, -1, 77, -32768, 32767, 12345, -3], dtype=np.int16)
    y = np.array([5, -1, 1, 77, 1, -1, -12345, 32767], dtype=np.int16)
    results = np.empty((13, LANES), np.int16)
    run(x, y, results.reshape(-1))
    saturated = np.clip(x.astype(int) - y, -32768, 32767)
    expected = [x + y, x - y, x * np.int16(3), x & y, x | 1, x ^ y, x << 2, x >> 1, np.maximum(x, y), saturated]
    expected += [np.maximum(x, y), np.where(x == -32768, y, 7), np.trunc(x / 2)]
    assert np.array_equal(results, np.array(expected).astype(np.int16))
