"""convert() makes the same bits whoever does the work, and whatever the two models share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import ALL, conv_net, images, mlp, same_bits, vectors
from tnm_pipeline.training.convert import METHODS, convert
from tnm_pipeline.training.convert.problem import DAMPING
from tnm_pipeline.training.pattern import Pattern

QUICK = [name for name in METHODS if name != "adaprune"]  # whose thousand steps are tested elsewhere


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_bit(workers: int) -> None:
    pattern = Pattern(2, 4, transposable=True)
    for build, batches in ((mlp, vectors(5)), (conv_net, images(3))):
        alone, together = build(), build()
        first = convert(alone, pattern, batches, selection=ALL)
        second = convert(together, pattern, batches, selection=ALL, workers=workers)
        assert same_bits(alone, together)
        assert [(one.error, one.error_masked) for one in first.layers] == [
            (one.error, one.error_masked) for one in second.layers
        ]


def test_each_layer_gets_the_damping_of_a_trial_on_its_halves() -> None:
    def dampings(batches: list[Tensor], workers: int = 1) -> list[float | None]:
        conversion = convert(mlp(), Pattern(2, 4), batches, selection=ALL, workers=workers)
        return [layer.damping for layer in conversion.layers]

    tried = dampings(vectors(4, examples=16))
    assert set(tried) != {DAMPING}
    assert dampings(vectors(4, examples=16), workers=3) == tried
    assert set(dampings(vectors(1, examples=64))) == {DAMPING}  # there is no other half


class Swapping(nn.Module):
    """Some batches take its layers the other way round."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if float(x[0, 0]) > 0 else (self.b, self.a)
        result: Tensor = self.last(second(first(x).relu()).relu())
        return result


def both_ways() -> list[Tensor]:
    batches = vectors(4)
    for number, batch in enumerate(batches):
        batch[0, 0] = 1.0 if number % 2 == 0 else -1.0
    return batches


def test_a_dense_model_shares_weights_that_are_not_converted_yet() -> None:
    """Its outputs are the targets all the same: those of a conversion with a dense model of its own."""
    cases: list[tuple[Callable[[], nn.Module], list[Tensor]]]
    cases = [(mlp, vectors()), (conv_net, images()), (Swapping, both_ways())]
    for build, batches in cases:
        first, second = build(), build()
        shared = convert(first, Pattern(2, 4), batches, selection=ALL)
        apart = convert(second, Pattern(2, 4), batches, selection=ALL, reference=build())
        assert same_bits(first, second)
        assert [layer.error_own for layer in shared.layers] == [layer.error_own for layer in apart.layers]


@pytest.mark.parametrize("method", QUICK)
def test_the_same_inputs_give_the_same_bits(method: str) -> None:
    models = [conv_net(), conv_net()]
    for model in models:
        convert(model, Pattern(2, 4), images(), method=method)
    assert same_bits(*models)
