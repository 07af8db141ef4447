"""Bases of attention heads in which masks keep more."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import ALL, violations, weight_of
from tests.training.convert.test_heads import Attention, fused, outputs, random_rotation
from tests.training.zoo import SMALL
from tnm_pipeline.training.convert import convert, layer_errors, reorder
from tnm_pipeline.training.convert.heads import HeadSpace, find_head_spaces
from tnm_pipeline.training.convert.rotation import Rotation, search_rotation
from tnm_pipeline.training.convert.tracing import trace
from tnm_pipeline.training.pattern import Pattern

KINDS = ["2:4", "2:4-T", "1:4", "4:8-T"]


class Wide(nn.Module):
    """Two heads of 8 channels, 16 inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.query, self.key, self.value, self.output = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


def spaces_of(model: nn.Module) -> list[HeadSpace]:
    return find_head_spaces(trace(model, torch.randn(2, 5, 16)), model)


def kept_energy(model: nn.Module, layer: str, pattern: Pattern) -> float:
    """The share that the best mask keeps; row-wise patterns only, by sorting every group."""
    groups = weight_of(model, layer).double().square().reshape(-1, pattern.m)
    return float(groups.sort(1).values[:, -pattern.n :].sum() / groups.sum())


def test_a_rotation_is_what_it_says() -> None:
    model = Attention(fused)
    space = find_head_spaces(trace(model, torch.randn(2, 5, 8)), model)[1]
    rotation = random_rotation(space)
    rotated = copy.deepcopy(model)
    rotation.apply(rotated)
    matrix = rotation.matrix.tolist()
    for head, (i, j) in product(range(2), product(range(3), range(6))):
        of_head = range(3 * head, 3 * head + 3)
        values = [float(weight_of(model, "value")[row, j]) for row in of_head]
        expected = sum(matrix[head][i][k] * value for k, value in enumerate(values))
        assert float(weight_of(rotated, "value")[3 * head + i, j]) == pytest.approx(expected, abs=1e-6)
        read = [float(weight_of(model, "output")[j, column]) for column in of_head]
        expected = sum(matrix[head][i][k] * value for k, value in enumerate(read))
        assert float(weight_of(rotated, "output")[j, 3 * head + i]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(weight_of(model, "query"), weight_of(rotated, "query"))
    assert torch.equal(model.output.bias, rotated.output.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_keep_more_and_the_network_is_the_same(kind: str) -> None:
    model = Wide()
    noise = torch.randn(3, 7, 16)
    expected = outputs(model, noise)
    for space in spaces_of(model):
        rotation = search_rotation(model, space, {part.layer: Pattern.parse(kind) for part in space.parts})
        assert rotation is not None
        assert rotation.kept_after > rotation.kept_before + 0.02
        identity = torch.eye(8, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(rotation.matrix @ rotation.matrix.mT, identity, atol=1e-12, rtol=0)
        rotation.apply(model)
    torch.testing.assert_close(outputs(model, noise), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_what_is_said_to_be_kept_is_the_mean_of_both_layers(n: int, m: int) -> None:
    model, pattern = Wide(), Pattern(n, m)
    space = spaces_of(model)[0]
    rotation = search_rotation(model, space, {"query": pattern, "key": pattern})
    assert rotation is not None
    for expected in (rotation.kept_before, rotation.kept_after):
        kept = (kept_energy(model, "query", pattern) + kept_energy(model, "key", pattern)) / 2
        assert kept == pytest.approx(expected, abs=1e-6)
        rotation.apply(model)


def test_only_layers_with_a_pattern_count() -> None:
    model, pattern = Wide(), Pattern(2, 4)
    space, other = spaces_of(model)
    rotation = search_rotation(model, space, {"key": pattern, "output": pattern})
    assert rotation is not None
    for expected in (rotation.kept_before, rotation.kept_after):
        assert kept_energy(model, "key", pattern) == pytest.approx(expected, abs=1e-6)
        rotation.apply(model)
    assert search_rotation(model, other, {"query": pattern}) is None


def test_weights_that_lose_nothing_keep_their_basis() -> None:
    model = Wide()
    with torch.no_grad():
        model.query.weight[:, ::2] = 0
        model.key.weight.zero_()
    assert search_rotation(model, spaces_of(model)[0], {"query": Pattern(2, 4), "key": Pattern(2, 4)}) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_left_to_the_conversion(value: float) -> None:
    model = Wide()
    with torch.no_grad():
        model.key.weight[3, 5] = value
    assert search_rotation(model, spaces_of(model)[0], {"query": Pattern(2, 4), "key": Pattern(2, 4)}) is None
    with pytest.raises(ValueError, match="has NaN or Inf entries"):
        convert(model, Pattern(2, 4), [torch.randn(4, 5, 16)], selection=ALL)


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("kind", ["2:4", "2:4-T"])
def test_conversions_rotate_and_lose_less(name: str, kind: str) -> None:
    build, inputs = SMALL[name]
    batches = [inputs(16, seed) for seed in range(3)]
    pattern = Pattern.parse(kind)
    errors = []
    for reorder_channels in (False, True):
        dense, model = build(), build()
        conversion = convert(
            model, pattern, batches, selection=ALL, reorder_channels=reorder_channels, sequential=False
        )
        rotations = [one for one in conversion.reorderings if isinstance(one, Rotation)]
        assert len(rotations) == 4 * reorder_channels
        reorder(dense, conversion.reorderings)
        torch.testing.assert_close(outputs(dense, batches[0]), outputs(build(), batches[0]), atol=1e-5, rtol=1e-5)
        names = [layer for layer in conversion.masks if "attention" in layer]
        assert all(violations(weight_of(model, layer), pattern) == 0 for layer in names)
        own = layer_errors(dense, model, names, [inputs(16, 100)])
        errors.append(sum(error.own for error in own.values()))
        if rotations:
            facts = rotations[0].to_dict()
            assert facts["heads"] == 2
            assert facts["layers"] == [part.layer for part in rotations[0].space.parts]
    assert errors[1] < 0.95 * errors[0]
