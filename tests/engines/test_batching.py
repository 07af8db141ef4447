from typing import Any

import numpy as np
import pytest

from tnm_pipeline.engines import Batching, TensorSpec
from tnm_pipeline.engines.batching import Extent, Joiner

IDS = TensorSpec("ids", "int64", ("batch", "tokens"))
MASK = TensorSpec("mask", "int64", ("batch", "tokens"))
STATES = TensorSpec("states", "float32", ("batch", "tokens", 3))
POOLED = TensorSpec("pooled", "float32", ("batch", 3))
PAD = Batching(max_batch=8, pad={"ids": 7, "mask": 0})


def call(rows: int, tokens: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, 100, (rows, tokens)), "mask": np.ones((rows, tokens), np.int64)}


def network(feeds: Any) -> dict[str, Any]:
    """What ignores padding, in loops."""
    ids, mask = feeds["ids"], feeds["mask"]
    states = np.stack([ids, ids * mask, mask], 2).astype(np.float32)
    return {"states": states, "pooled": np.stack([(ids * mask).sum(1), mask.sum(1), ids[:, 0]], 1).astype(np.float32)}


def test_calls_of_other_lengths_are_answered_as_if_alone() -> None:
    joiner = Joiner(PAD, (IDS, MASK), (STATES, POOLED))
    calls = [call(1, 5, 0), call(3, 2, 1), call(2, 9, 2)]
    assert len({joiner.key(feeds) for feeds in calls}) == 1
    assert [joiner.extent(feeds) for feeds in calls] == [
        Extent(1, ((5,), (5,)), 10),
        Extent(3, ((2,), (2,)), 12),
        Extent(2, ((9,), (9,)), 36),
    ]
    joined = joiner.join(calls)
    assert joined["ids"].shape == joined["mask"].shape == (6, 9)
    assert joined["ids"].dtype == np.int64
    assert (joined["ids"][0, 5:] == 7).all()
    assert joined["mask"].sum() == 5 + 6 + 18
    for feeds, answer in zip(calls, joiner.split(network(joined), calls), strict=True):
        for name, alone in network(feeds).items():
            np.testing.assert_array_equal(answer[name], alone)
            assert answer[name].base is None  # nobody shares memory


def test_without_padding_only_equal_sizes_are_joined() -> None:
    joiner = Joiner(Batching(), (IDS, MASK), (STATES, POOLED))
    calls = [call(1, 5, 0), call(2, 5, 1)]
    assert joiner.key(calls[0]) == joiner.key(calls[1]) != joiner.key(call(1, 4, 2))
    for feeds, answer in zip(calls, joiner.split(network(joiner.join(calls)), calls), strict=True):
        for name, alone in network(feeds).items():
            np.testing.assert_array_equal(answer[name], alone)


@pytest.mark.parametrize(
    ("batching", "inputs", "outputs", "complaint"),
    [
        (Batching(), (TensorSpec("x", "float32", (1, 8)),), (POOLED,), "begin with one dynamic dimension"),
        (Batching(), (TensorSpec("x", "float32", ("n", 8)),), (POOLED,), "begin with one dynamic dimension"),
        (Batching(), (IDS, TensorSpec("scale", "float32", ())), (POOLED,), "begin with one dynamic dimension"),
        (
            Batching(max_batch=9),
            (TensorSpec("x", "float32", ("batch", 8), {"batch": (1, 4, 8)}),),
            (POOLED,),
            "max_batch is 9, and the plan was built for a batch of at most 8",
        ),
        (Batching(pad={"ids": 0}), (IDS, MASK), (POOLED,), r"pad is for \['ids'\], and .* are \['ids', 'mask'\]"),
        (
            Batching(pad={"ids": 0.5, "mask": 0}),
            (IDS, MASK),
            (POOLED,),
            "fills input ids with 0.5, which its type",
        ),
        (Batching(pad={"ids": 0, "mask": 1e30}), (IDS, MASK), (POOLED,), "fills input mask with 1e.30"),
        (Batching(pad={"ids": 0, "mask": float("nan")}), (IDS, MASK), (POOLED,), "fills input mask with nan"),
        (
            PAD,
            (IDS, MASK),
            (TensorSpec("pairs", "float32", ("batch", "pairs")),),
            r"output pairs has the size \['pairs'\], which no input has",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(
    batching: Batching, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Joiner(batching, inputs, outputs)


@pytest.mark.parametrize(
    "bounds", [{"max_batch": 1}, {"max_delay": -1.0}, {"max_delay": float("nan")}, {"max_padding": 1.0}]
)
def test_bounds_without_sense_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="or load without batching"):
        Batching(**bounds)
