"""Batch norms of a converted model against the outputs that they should have."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import ALL, conv_net, images
from tnm_pipeline.training.convert import convert
from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.batch_norm import BatchNorm, match_statistics, moments
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.pattern import Pattern


def maps(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.1, 5.0, 2.0])[:, None, None]
    return [torch.randn(6, 4, 5, 7, generator=generator) * spread + seed for _ in range(count)]


def trained_norm() -> nn.BatchNorm2d:
    """In evaluation mode, its statistics not those of any data here."""
    norm = nn.BatchNorm2d(4).eval()
    for number, name in enumerate(("weight", "bias", "running_mean", "running_var")):
        tensor = torch.rand(4, generator=torch.Generator().manual_seed(number)) + 0.5
        getattr(norm, name).data.copy_(tensor)
    return norm


@pytest.mark.parametrize("workers", [1, 3])
def test_moments_are_those_of_all_values_of_a_channel(workers: int) -> None:
    found = moments("norm", maps(3), Group(workers=workers))
    values = torch.cat(maps(3)).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, values.mean(1))
    torch.testing.assert_close(found.variance, values.var(1, correction=0))
    flat = moments("norm", [x[:, :, 0, 0] for x in maps(3)], Group())
    torch.testing.assert_close(flat.mean, torch.cat(maps(3))[:, :, 0, 0].double().mean(0))


@torch.no_grad()
def test_outputs_have_the_mean_and_spread_of_the_dense_ones() -> None:
    dense = trained_norm()
    norm = copy.deepcopy(dense)
    weight, bias = norm.weight.clone(), norm.bias.clone()
    given, wanted = [0.5 * x**2 for x in maps(1)], maps(2)
    match_statistics(norm, dense, moments("n", given, Group()), moments("n", wanted, Group()))
    outputs, targets = norm(torch.cat(given)), dense(torch.cat(wanted))
    torch.testing.assert_close(outputs.mean((0, 2, 3)), targets.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.std((0, 2, 3)), targets.std((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.weight, weight)
    assert torch.equal(norm.bias, bias)


@torch.no_grad()
def test_the_same_inputs_change_nothing() -> None:
    dense = trained_norm()
    norm = copy.deepcopy(dense)
    same = moments("n", maps(1), Group())
    match_statistics(norm, dense, same, same)
    torch.testing.assert_close(norm.running_mean, dense.running_mean)
    torch.testing.assert_close(norm.running_var, dense.running_var)


@pytest.mark.parametrize("which", ["dead in both", "dead in the converted one", "constant in the dense one"])
@torch.no_grad()
def test_channels_without_any_spread_keep_their_scale_and_mean(which: str) -> None:
    dense = trained_norm()
    norm = copy.deepcopy(dense)
    given, wanted = [x.clone() for x in maps(1)], [x.clone() for x in maps(2)]
    for x in given if which != "constant in the dense one" else ():
        x[:, 2] = 0
    for x in wanted if which != "dead in the converted one" else ():
        x[:, 2] = 0.7
    match_statistics(norm, dense, moments("n", given, Group()), moments("n", wanted, Group()))
    assert norm.running_var is not None
    assert dense.running_var is not None
    torch.testing.assert_close(norm.running_var[2], dense.running_var[2])
    outputs, targets = norm(torch.cat(given)), dense(torch.cat(wanted))
    assert bool(torch.isfinite(outputs).all())
    torch.testing.assert_close(outputs.mean((0, 2, 3)), targets.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflow_names_the_norm_and_what_to_do(value: float) -> None:
    x = torch.ones(2, 4, 3, 3)
    x[0, 1, 2, 0] = value
    with pytest.raises(CalibrationError, match=r"batch norm some meets NaN or Inf .*retune_batch_norm = false"):
        moments("some", [torch.ones(2, 4, 3, 3), x], Group())


@pytest.mark.parametrize("retune", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "admm"])
@torch.no_grad()
def test_a_converted_network_keeps_the_statistics_of_its_norms(method: str, retune: bool) -> None:
    dense = conv_net().eval()
    dense(torch.cat(images(seed=5)))
    model = copy.deepcopy(dense)
    conversion = convert(
        model,
        Pattern(1, 4),
        images(),
        method=method,
        selection=ALL,
        retune_batch_norm=retune,
        reorder_channels=False,
    )
    assert conversion.batch_norms == retune
    x = torch.cat(images())
    outputs, targets = model[:2](x), dense[:2](x)
    close = torch.allclose(outputs.std((0, 2, 3)), targets.std((0, 2, 3)), rtol=1e-3)
    assert close == retune
    if retune:
        torch.testing.assert_close(outputs.mean((0, 2, 3)), targets.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    else:
        assert all(torch.equal(a, b) for a, b in zip(statistics(model[1]), statistics(dense[1]), strict=True))


def statistics(norm: nn.Module) -> list[Tensor]:
    assert isinstance(norm, BatchNorm)
    return list(norm.buffers())
