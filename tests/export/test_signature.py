import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.signature import Signature, call, named, named_outputs, signature_of, to_trace


class Pair(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


def _sample(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_names_come_from_the_caller_or_from_forward() -> None:
    tensor = torch.zeros(2)
    assert list(named(Pair(), tensor)) == ["input"]
    assert list(named(Pair(), (tensor, tensor))) == ["left", "right"]
    assert list(named(Pair(), {"right": tensor})) == ["right"]
    with pytest.raises(ExportRejected, match=r"takes 2 inputs \(left, right\), and the sample has 3"):
        named(Pair(), (tensor, tensor, tensor))
    with pytest.raises(ExportRejected, match="not nothing"):
        named(Pair(), ())


class Open(nn.Module):
    def forward(self, first: Tensor | None = None, **others: Tensor) -> list[str]:
        return ["first"] * (first is not None) + list(others)


class Keywords(nn.Module):
    def forward(self, **tensors: Tensor) -> list[str]:
        return list(tensors)


def test_names_decide_not_positions() -> None:
    one = torch.ones(2)
    with pytest.raises(ExportRejected, match=r"Pair\.forward\(\) takes left, right, and the sample has other: give"):
        named(Pair(), {"right": one, "other": one})
    assert torch.equal(call(nn.Identity(), named(nn.Identity(), one)), one)  # type: ignore[arg-type]  # a tensor
    assert call(Open(), named(Open(), one)) == ["first"]
    assert call(Open(), named(Open(), {"other": one})) == ["other"]
    assert call(Keywords(), named(Keywords(), {"a": one, "b": one})) == ["a", "b"]
    assert call(Keywords(), named(Keywords(), {"input": one})) == ["input"]


def test_only_the_batch_varies_where_samples_are_alike() -> None:
    assert signature_of([_sample(input=(3, 1, 8, 8))]) == Signature({"input": ("batch", 1, 8, 8)}, {})
    assert signature_of([_sample(input=(3, 4)), _sample(input=(5, 4))]) == Signature({"input": ("batch", 4)}, {})


def test_tokens_and_their_mask_are_one_dimension() -> None:
    samples = [_sample(ids=(4, n), mask=(4, n), table=(7, 3)) for n in (12, 5, 30)]
    tokens: tuple[int | str, ...] = ("batch", "sequence")
    shapes: dict[str, tuple[int | str, ...]] = {"ids": tokens, "mask": tokens, "table": (7, 3)}
    assert signature_of(samples) == Signature(shapes, {"sequence": (5, 12, 30)})


def test_dimensions_that_vary_apart_have_names_of_their_own() -> None:
    samples = [_sample(image=(2, 3, n, n), text=(2, n + 1)) for n in (8, 16)]
    found = signature_of(samples)
    assert found.shapes == {"image": ("batch", 3, "height", "width"), "text": ("batch", "sequence")}
    assert found.ranges == {"height": (8, 8, 16), "width": (8, 8, 16), "sequence": (9, 9, 17)}
    both = signature_of([_sample(left=(2, n), right=(2, 2 * n)) for n in (3, 4)])
    assert both.shapes == {"left": ("batch", "sequence"), "right": ("batch", "right_dim_1")}


def test_samples_must_be_alike() -> None:
    with pytest.raises(ExportRejected, match="samples differ in names, ranks or dtypes"):
        signature_of([_sample(input=(2, 3)), _sample(other=(2, 3))])


def test_the_largest_sample_is_traced_with_two_entries() -> None:
    samples = [_sample(ids=(1, 4), scale=()), _sample(ids=(1, 9), scale=())]
    traced = to_trace(samples, signature_of(samples))
    assert {name: tuple(tensor.shape) for name, tensor in traced.items()} == {"ids": (2, 9), "scale": ()}


def test_outputs_by_name() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert list(named_outputs(one)) == ["output"]
    assert list(named_outputs((one, (two, None)))) == ["output_0", "output_1_0"]
    assert list(named_outputs({"logits": one, "states": [one, two], "loss": None})) == [
        "logits",
        "states_0",
        "states_1",
    ]
    with pytest.raises(ExportRejected, match="returns a float as score"):
        named_outputs({"score": 0.5})
    with pytest.raises(ExportRejected, match="returns no tensor"):
        named_outputs(None)
