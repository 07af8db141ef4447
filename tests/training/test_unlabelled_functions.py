"""Unlabelled inputs from the user's functions, in every form that they may have; other forms are named."""

from typing import Any

import pytest
import torch

from tests.training.unlabelled import joined, loaded, named, permutation
from tnm_pipeline.training.sources import SourceError

USER_MODULE = """
import itertools
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
from tnm_pipeline.training.sources import Splits

rows = torch.arange(20).reshape(10, 2)

def splits():
    data = TensorDataset(rows.float(), torch.arange(10))
    return Splits(data, data)

def arrays():
    return rows.numpy(), np.arange(10), rows.numpy(), np.arange(10)

def tensor(dtype="int32"):
    return rows.to(getattr(torch, dtype))

def named():
    return {"input_ids": rows, "attention_mask": (rows > 3).numpy()}

def endless():
    for start in itertools.count():
        yield {"x": torch.full((3, 2), float(start))}

def loader():
    return DataLoader(TensorDataset(rows.float(), rows), batch_size=4)

def dataset():
    return TensorDataset(rows)

def text():
    return "text"

def nothing():
    return []

def bad_batches():
    return ["text"]

def unequal():
    return [(torch.ones(3, 2), torch.ones(4))]

def scalars():
    return [{"x": torch.tensor(1.0)}]

def empty_batch():
    return [()]

def nan():
    return [torch.ones(3, 2), torch.tensor([[1.0, float("nan")]])]

def fails():
    yield torch.ones(3, 2)
    raise RuntimeError("disk on fire")
"""


@pytest.mark.parametrize(
    ("function", "arguments", "dtype"),
    [
        ("splits", {}, torch.float32),
        ("arrays", {}, torch.float32),
        ("tensor", {}, torch.int64),
        ("tensor", {"dtype": "float64"}, torch.float32),
        ("tensor", {"dtype": "bool"}, torch.bool),
    ],
)
def test_functions_that_give_all_examples(
    user_module: str, function: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    result = joined(loaded(f"{user_module}:{function}", arguments, samples=8))
    assert torch.equal(result, torch.arange(20).reshape(10, 2)[permutation(10)[:8]].to(dtype))
    assert result.dtype == dtype


def test_functions_that_give_tensors_by_name(user_module: str) -> None:
    batches = named(loaded(f"{user_module}:named", batch_size=5))
    rows = torch.arange(20).reshape(10, 2)[permutation(10)]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), rows)
    assert torch.equal(torch.cat([batch["attention_mask"] for batch in batches]), rows > 3)


def test_batches_are_taken_in_order_until_there_are_enough(user_module: str) -> None:
    batches = named(loaded(f"{user_module}:endless", samples=7))
    assert [batch["x"][:, 0].tolist() for batch in batches] == [[0, 0, 0], [1, 1, 1], [2]]
    first, second = loaded(f"{user_module}:loader", samples=6)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert torch.equal(first[0], torch.arange(8.0).reshape(4, 2))
    assert torch.equal(second[1], torch.arange(8, 12).reshape(2, 2))


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("dataset", "TensorDataset of single examples: wrap it in a DataLoader"),
        ("text", "returned a str: return a tensor"),
        ("nothing", "gives 0 examples"),
        ("bad_batches", "batch 0 is a str"),
        ("unequal", "batch 0 has tensors of 3, 4 examples"),
        ("scalars", "batch 0 must be tensors whose first axis counts examples"),
        ("empty_batch", "batch 0 must be tensors"),
        ("nan", "calibration batch 1 has 1 NaN or Inf of 2 values"),
        ("fails", "raised RuntimeError: disk on fire"),
        ("missing", "cannot import calibration source"),
    ],
)
def test_functions_that_give_something_else_are_refused(user_module: str, function: str, cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        loaded(f"{user_module}:{function}")
