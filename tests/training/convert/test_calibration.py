"""Batches, and what every stage asks of a model."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, attended, check_batches, forward, head
from tnm_pipeline.training.convert.calibration import prunable_layer

NAN, INF = float("nan"), float("inf")


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b


def test_a_batch_is_whatever_forward_takes() -> None:
    a, b = torch.ones(2, 3), torch.full((2, 3), 5.0)
    for batch in ((a, b), [a, b], {"b": b, "a": a}):
        assert torch.equal(forward(Sum(), batch), a + 2 * b)  # type: ignore[arg-type]  # what forward returned
    assert torch.equal(forward(nn.Identity(), a), a)  # type: ignore[arg-type]  # what forward returned


def test_head_takes_the_first_examples_of_every_tensor() -> None:
    a, b = torch.arange(6.0).view(3, 2), torch.arange(3)
    assert torch.equal(head(a, 2), a[:2])  # type: ignore[arg-type]  # a tensor
    assert [len(tensor) for tensor in head((a, b), 2)] == [2, 2]
    named = head({"a": a, "b": b}, 1)
    assert isinstance(named, dict)
    assert torch.equal(named["b"], b[:1])


def test_attended_is_the_mask_if_it_leaves_something_out() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    real = attended({"attention_mask": mask})
    assert real is not None
    assert torch.equal(real, mask.bool())
    assert attended({"attention_mask": torch.ones(2, 3)}) is None
    assert attended({"attention_mask": torch.zeros(2, 1, 3, 3)}) is None
    assert attended(mask) is None


def test_layers_by_name() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert prunable_layer(network, "0") is network[0]
    with pytest.raises(TypeError, match="1 is a ReLU: only Linear and Conv2d"):
        prunable_layer(network, "1")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([torch.ones(2, 8), torch.ones(0, 8)], r"batch 1 is empty, shape \(0, 8\)"),
        ([torch.ones(2, 8), torch.tensor([[1.0, NAN, INF]])], "batch 1 has 2 NaN or Inf of 3"),
        ([{"ids": torch.ones(2), "pixels": torch.tensor([-INF])}], r"batch 0 \(pixels\) has 1 NaN or Inf of 1"),
        ([(torch.ones(2), torch.tensor([NAN]))], r"batch 0 \(input 1\) has 1 NaN"),
    ],
)
def test_useless_data_is_refused(batches: Sequence[Batch], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_batches(batches)


def test_token_ids_pass() -> None:
    check_batches([torch.arange(6).reshape(2, 3)])
