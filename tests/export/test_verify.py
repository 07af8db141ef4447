import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tnm_pipeline.export.errors import AccuracyGateFailed
from tnm_pipeline.export.verify import Tally, check, compare

RNG = np.random.default_rng(0)


def _one(values: object) -> dict[str, NDArray[np.float64]]:
    return {"output": np.asarray(values, np.float64)}


def test_figures_by_hand() -> None:
    parity = compare(_one([[3.0, 4.0], [0.0, -8.0]]), _one([[3.0, 4.5], [0.0, -8.0]]))
    assert parity.output == "output"
    assert (parity.max_abs, parity.scaled, parity.relative_to_absmax) == (0.5, 0.5 / 8, 0.5 / 8)
    assert parity.cosine == pytest.approx(91 / math.sqrt(89 * (9 + 4.5**2 + 64)))
    assert parity.top1_agreement == 1.0
    turned = compare(_one([[0.1, 0.2], [0.2, 0.1]]), _one([[0.1, 0.2], [0.1, 0.2]]))
    assert turned.top1_agreement == 0.5


def test_batches_count_like_one_call() -> None:
    expected, actual = RNG.standard_normal((2, 30, 5))
    whole, parts = compare(_one(expected), _one(actual)), Tally()
    for start in range(0, 30, 7):
        parts.add(_one(expected[start : start + 7]), _one(actual[start : start + 7]))
    for figure, value in vars(whole).items():
        assert getattr(parts.parity(), figure) == (value if figure == "output" else pytest.approx(value))


def test_the_worst_of_several_outputs_is_named() -> None:
    good, bad = RNG.standard_normal((2, 4, 3))
    parity = compare({"first": good, "second": bad}, {"first": good, "second": bad + 0.25})
    assert parity.output == "second"
    assert parity.max_abs == pytest.approx(0.25)
    assert parity.cosine < 1


def test_padding_does_not_count() -> None:
    expected = RNG.standard_normal((2, 3, 4))
    actual = expected.copy()
    actual[1, 2] += 7  # a token that is padding
    pooled = RNG.standard_normal((2, 4))
    attended = np.array([[True, True, True], [True, True, False]])
    tally = Tally()
    tally.add({"tokens": expected, "pooled": pooled}, {"tokens": actual, "pooled": pooled + 1e-3}, attended)
    assert tally.parity().max_abs == pytest.approx(1e-3)  # the pooled output has no tokens, and counts
    actual[1, 1] += 0.5
    tally.add({"tokens": expected, "pooled": pooled}, {"tokens": actual, "pooled": pooled}, attended)
    assert tally.parity().max_abs == pytest.approx(0.5)


@pytest.mark.parametrize("where", [0, 1])
def test_nan_is_never_accepted(where: int) -> None:
    pair = [np.ones((3, 2)), np.ones((3, 2))]
    pair[where][1, 1] = math.nan
    tally = Tally()
    tally.add(_one(pair[0]), _one(pair[1]))
    tally.add(_one(np.ones((3, 2))), _one(np.ones((3, 2))))  # a good batch later does not cover it
    parity = tally.parity()
    assert math.isnan(parity.max_abs)
    with pytest.raises(AccuracyGateFailed):
        check(parity, "fp32", "model.onnx")


def test_zeros() -> None:
    assert compare(_one(np.zeros((2, 2))), _one(np.zeros((2, 2)))).cosine == 1.0
    parity = compare(_one(np.zeros((2, 2))), _one(np.ones((2, 2))))
    assert (parity.cosine, parity.relative_to_absmax) == (0.0, math.inf)


def test_what_cannot_be_compared() -> None:
    for other in ({"other": np.ones(2)}, {}, {"output": np.ones(3)}):
        with pytest.raises(AccuracyGateFailed, match="compare"):
            compare(_one(np.ones(2)), other)
    with pytest.raises(AccuracyGateFailed, match="compare non-empty"):
        compare(_one(np.ones((0, 2))), _one(np.ones((0, 2))))


@pytest.mark.parametrize(
    ("precision", "reference", "within", "beyond"),
    [
        ("fp32", [500.0, 1.0], [500.004, 1.0], [500.006, 1.0]),  # 1e-5 of 500
        ("fp32", [0.5, 0.1], [0.500009, 0.1], [0.50002, 0.1]),  # 1e-5
        ("fp16", [0.5, 0.1], [0.502, 0.1], [0.503, 0.1]),  # 5e-3 of 0.5
        ("bf16", [0.5, 0.1], [0.519, 0.1], [0.521, 0.1]),  # 4e-2 of 0.5
    ],
)
def test_limits(precision: str, reference: list[float], within: list[float], beyond: list[float]) -> None:
    check(compare(_one(reference), _one(within)), precision, "model.onnx")
    with pytest.raises(AccuracyGateFailed, match=r"model\.onnx differs from torch at output 'output': .* limit"):
        check(compare(_one(reference), _one(beyond)), precision, "model.onnx")


def test_a_direction_that_turned_is_refused_though_no_entry_is_far_off() -> None:
    """Many small errors: each within 5e-3 of the largest entry, together a cosine below 0.9999."""
    reference = np.full((1, 10_000), 0.1)
    reference[0, 0] = 1.0
    turned = reference + 4.9e-3 * RNG.choice([-1, 1], reference.shape)
    parity = compare(_one(reference), _one(turned))
    assert parity.relative_to_absmax <= 5e-3
    with pytest.raises(AccuracyGateFailed, match=r"cosine 0\.99\d+, limit 0\.9999"):
        check(parity, "fp16", "model.onnx")
