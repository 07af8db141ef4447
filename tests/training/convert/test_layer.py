"""One layer converted from its sums: what is stored, and what is said about it."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import violations
from tnm_pipeline.training.convert.collect import Collector, Seen
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.layer import convert_layer
from tnm_pipeline.training.convert.methods import METHODS
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem, Solution
from tnm_pipeline.training.convert.result import ConvertedLayer
from tnm_pipeline.training.pattern import Pattern


def inputs() -> tuple[Tensor, Tensor]:
    """Of the dense and of the converted model, (200, 16)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 1
    return x, x + 0.2 * torch.randn(200, 16, generator=generator)


def linear(outputs: int = 24, *, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(16, outputs, bias=bias)


@torch.no_grad()
def converted(
    layer: nn.Linear,
    dense: nn.Linear,
    method: str = "admm",
    text: str = "2:4",
    *,
    workers: int = 1,
    normed: bool = False,
    sequential: bool = True,
) -> tuple[ConvertedLayer, Tensor]:
    group = Group(workers=workers)
    x, sparse_x = inputs()
    sums = Collector(group, sequential=sequential).collect("some", dense, [Seen([x], [sparse_x])])
    return convert_layer(
        "some",
        layer,
        dense,
        *sums,
        halves=lambda: None,
        pattern=Pattern.parse(text),
        method=METHODS[method],
        solver="exact",
        group=group,
        normed=normed,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["admm", "magnitude"])
@torch.no_grad()
def test_the_report_is_about_the_layer_that_is_stored(method: str, bias: bool) -> None:
    layer, dense = linear(bias=bias), linear(bias=bias)
    report, mask = converted(layer, dense, method)
    x, sparse_x = inputs()
    wanted = dense(x)
    scale = float((x @ dense.weight.T).norm())
    assert report.error == pytest.approx(float((layer(sparse_x) - wanted).norm()) / scale, rel=1e-4)
    assert report.error_own == pytest.approx(float((layer(x) - wanted).norm()) / scale, rel=1e-4)
    assert report.samples == 200
    assert report.live_inputs == 16
    assert report.gemm_shape == report.shape == (24, 16)
    kept = float(dense.weight[mask].abs().sum() / dense.weight.abs().sum())
    assert report.kept_magnitude == pytest.approx(kept)
    assert report.violations == violations(layer.weight.detach(), Pattern(2, 4)) == 0
    assert (layer.bias is not None) == bias
    if method == "magnitude":
        assert torch.equal(layer.weight, torch.where(mask, dense.weight, 0.0))
    if bias:
        torch.testing.assert_close(layer(sparse_x).mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_error_of_the_masked_weights_is_that_of_what_was_there() -> None:
    layer, dense = linear(), linear()
    report, _ = converted(layer, dense)
    masked, mask = linear(), converted(linear(), dense, "magnitude")[1]
    masked.weight.mul_(mask)
    x, sparse_x = inputs()
    error = float((masked(sparse_x) - dense(x)).norm() / (x @ dense.weight.T).norm())
    assert report.error_masked == pytest.approx(error, rel=1e-4)
    assert report.error < 0.8 * report.error_masked


@torch.no_grad()
def test_a_batch_norm_that_follows_takes_up_the_mean() -> None:
    dense = linear(bias=False)
    layer = copy.deepcopy(dense)
    report, _ = converted(layer, dense, normed=True)
    x, sparse_x = inputs()
    lag = layer(sparse_x) - dense(x)
    assert report.error == pytest.approx(float((lag - lag.mean(0)).norm() / dense(x).norm()), rel=1e-4)
    plain, _ = converted(copy.deepcopy(dense), dense)
    assert report.error < plain.error


@torch.no_grad()
def test_a_bias_is_found_even_where_the_dense_layer_has_none() -> None:
    dense, layer = linear(bias=False), linear()
    layer.bias.fill_(7.0)
    converted(layer, dense)
    x, sparse_x = inputs()
    torch.testing.assert_close(layer(sparse_x).mean(0), dense(x).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_workers_share_the_rows_and_change_no_bit(method: str) -> None:
    outputs = 2 * 128 + 20
    dense = linear(outputs)
    text = "2:4" if method == "sparsegpt" else "2:4-T"
    found = []
    for workers in (1, 3):
        layer = linear(outputs)
        report, mask = converted(layer, dense, method, text, workers=workers)
        found.append((layer.weight, layer.bias, mask))
        assert report.error < report.error_masked
        assert violations(layer.weight.detach(), Pattern.parse(text)) == 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_layer_that_no_damping_solves_is_masked_and_says_so() -> None:
    dense = linear(bias=False)
    gram = -torch.eye(16, dtype=torch.float64)
    w = dense.weight.double()
    zero, none = torch.zeros_like(w), torch.zeros(24, dtype=torch.float64)
    broken = Objective(gram, w, zero, torch.zeros(16, dtype=torch.float64), none, none, none + 1, 10)
    layer = linear(bias=False)
    report, mask = convert_layer(
        "some",
        layer,
        dense,
        broken,
        broken,
        halves=lambda: None,
        pattern=Pattern(2, 4),
        method=METHODS["admm"],
        solver="exact",
        group=Group(),
        normed=False,
    )
    assert report.damping is None
    assert torch.equal(layer.weight, torch.where(mask, dense.weight, 0.0))


@torch.no_grad()
def test_a_method_that_breaks_its_pattern_is_a_bug_and_found_out() -> None:
    def careless(parts: Sequence[Problem], _: Group) -> list[Solution]:
        return [Solution(part.weight, torch.ones_like(part.weight, dtype=torch.bool)) for part in parts]

    dense = linear()
    x, _ = inputs()
    sums = Collector(Group(), sequential=False).collect("some", dense, [Seen([x], [x])])
    with pytest.raises(AssertionError, match="layer some breaks 2:4 in 96 groups after conversion: a bug"):
        convert_layer(
            "some",
            linear(),
            dense,
            *sums,
            halves=lambda: None,
            pattern=Pattern(2, 4),
            method=careless,
            solver="exact",
            group=Group(),
            normed=False,
        )


def test_a_report_survives_json() -> None:
    report, _ = converted(linear(), linear())
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in report.to_dict().items()}
    assert ConvertedLayer.from_dict(lists) == report


@pytest.mark.parametrize("text", ["3:6-T", "6:12-T", "2:4-T"])
@torch.no_grad()
def test_pieces_are_whole_blocks_of_any_pattern(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Linear(24, 252), torch.randn(300, 24, generator=generator)
    dense = copy.deepcopy(layer)
    sums = Collector(Group(), sequential=False).collect("some", dense, [Seen([x], [x])])
    report, _ = convert_layer(
        "some",
        layer,
        dense,
        *sums,
        halves=lambda: None,
        pattern=Pattern.parse(text),
        method=METHODS["admm"],
        solver="exact",
        group=Group(),
        normed=False,
    )
    assert report.violations == 0
