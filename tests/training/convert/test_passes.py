"""Passes that wait: where they stop, what they hold, and that nothing is left of them."""

import copy
import threading
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import Backwards, mlp, same_bits, vectors, weight_of
from tnm_pipeline.training.convert.batch import Batch
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.residual import Endpoint
from tnm_pipeline.training.convert.schedule import schedule


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def passes_of(
    model: nn.Module,
    batches: list[Batch],
    stops: Mapping[str, tuple[str, ...]],
    partners: Mapping[str, Endpoint] | None = None,
    workers: int = 1,
) -> Passes:
    calls = schedule(model, stops, batches[0], norms=False).calls
    return Passes(model, dict(enumerate(batches)), stops, calls, partners or {}, workers)


def own(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


@pytest.mark.parametrize("workers", [1, 2, 5])
@torch.no_grad()
def test_inputs_are_those_of_the_model_as_it_is_by_then(workers: int) -> None:
    model, expected = mlp(), mlp()
    batches = vectors(4)
    with passes_of(model, list(batches), own("0", "2", "4"), workers=workers) as passes:
        for place, name in enumerate(("0", "2", "4")):
            assert [one.stop for one in passes.passes] == [name] * 4
            for x, one in zip(batches, passes.passes, strict=True):
                [given] = one.inputs_of(name)
                assert torch.equal(given, expected[: 2 * place](x))
            for network in (model, expected):
                weight_of(network, name).mul_(0.5)
            passes.leave(name)
        assert [one.stop for one in passes.passes] == [None] * 4
        assert [one.inputs_of("4") for one in passes.passes] == [[]] * 4
    assert same_bits(model, expected)


@torch.no_grad()
def test_a_layer_called_twice_has_both_inputs_before_in_place_activations() -> None:
    model, x = Backwards().eval(), vectors(1, width=8)[0]
    with passes_of(model, [x], own("first", "twice", "last")) as passes:
        passes.leave("first")
        first, second = passes.passes[0].inputs_of("twice")
        assert torch.equal(first, model.first(x).relu())
        assert torch.equal(second, model.twice(first).relu())
        passes.leave("twice")
        assert torch.equal(passes.passes[0].inputs_of("last")[0], model.twice(second).relu())


class InPlace(nn.Module):
    """Changes what its layer was given, as soon as that has run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        y = self.layer(h)
        h.zero_()
        result: Tensor = self.last(self.layer(y))
        return result


@torch.no_grad()
def test_earlier_inputs_survive_what_the_model_does_to_them() -> None:
    model, x = InPlace(), torch.randn(3, 4)
    with passes_of(model, [x], own("layer")) as passes:
        first, second = passes.passes[0].inputs_of("layer")
        assert torch.equal(first, x)
        assert torch.equal(second, model.layer(x))


@torch.no_grad()
def test_layers_that_share_a_weight_are_one_stop() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    x = torch.randn(3, 8)
    with passes_of(model, [x], {"0": ("0", "2"), "3": ("3",)}) as passes:
        first, second = passes.passes[0].inputs_of("0")
        assert torch.equal(first, x)
        assert torch.equal(second, model[:2](x))
        passes.leave("0")
        assert passes.passes[0].stop == "3"


class Branching(nn.Module):
    """Which layers run, and in which order, depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kind = int(x[0, 0])
        if kind == 0:
            x = self.b(self.a(x))
        elif kind == 1:
            x = self.a(self.b(x))
        result: Tensor = self.c(x)
        return result


@torch.no_grad()
def test_passes_that_take_another_way_are_not_in_the_way() -> None:
    model = Branching()
    batches: list[Batch] = [torch.full((2, 4), float(kind)) for kind in (0, 1, 2)]
    with passes_of(model, batches, own("a", "b", "c")) as passes:
        assert [one.stop for one in passes.passes] == ["a", "b", "c"]
        assert [len(one.inputs_of("a")) for one in passes.passes] == [1, 0, 0]
        passes.leave("a")
        assert [one.stop for one in passes.passes] == ["b", "b", "c"]
        passes.leave("b")
        assert [one.stop for one in passes.passes] == ["c", "c", "c"]
        passes.leave("c")
        assert [one.stop for one in passes.passes] == [None] * 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.last(h + self.layer(h))
        return result


@pytest.mark.parametrize("place", [Endpoint("first", 0, "output", 0), Endpoint("layer", 0, "input", 0)])
@torch.no_grad()
def test_partners_are_held_until_the_stop_is_left(place: Endpoint) -> None:
    model, x = Residual(), torch.randn(3, 4)
    with passes_of(model, [x], own("first", "layer", "last"), {"layer": place}) as passes:
        passes.leave("first")
        [one] = passes.passes
        assert torch.equal(one.partner_of("layer"), model.first(x))
        passes.leave("layer")
        with pytest.raises(KeyError):
            one.partner_of("layer")


class Failing(nn.Module):
    """Fails on batches that begin with a given number, before or after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) == 1:
            raise KeyError("at once")
        h = self.first(x)
        if float(x[0, 0]) == 2:
            raise KeyError("midway")
        result: Tensor = self.last(h)
        return result


def quiet(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_what_the_model_raises_at_the_start_is_raised(workers: int, place: int) -> None:
    model = Failing()
    calls = {"first": 1, "last": 1}
    batches = {index: torch.full((2, 4), float(index == place)) for index in range(6)}
    for _ in range(20):  # threads that started or not, suspended or not
        with (
            pytest.raises(KeyError, match="at once"),
            Passes(model, batches, own("first", "last"), calls, {}, workers),
        ):
            raise AssertionError("entered")
    assert quiet(model)


def test_what_the_model_raises_midway_is_raised() -> None:
    model = Failing()
    batches: list[Batch] = [torch.zeros(2, 4), torch.full((2, 4), 2.0), torch.zeros(2, 4)]
    with (
        pytest.raises(KeyError, match="midway"),
        passes_of(model, batches, own("first", "last"), workers=2) as passes,
    ):
        passes.leave("first")
    assert quiet(model)


def test_a_stop_that_is_no_module_leaves_no_hook() -> None:
    model = mlp()
    with pytest.raises(AttributeError), Passes(model, {0: vectors()[0]}, own("0", "nowhere"), {"0": 1}, {}):
        raise AssertionError("entered")
    assert quiet(model)


def test_leaving_early_abandons_the_passes() -> None:
    model = mlp()
    with passes_of(model, list(vectors(3)), own("0", "2"), workers=2) as passes:
        passes.leave("0")
        assert [one.stop for one in passes.passes] == ["2"] * 3
    assert [one.inputs_of("2") for one in passes.passes] == [[]] * 3
    assert quiet(model)


class Stubborn(nn.Module):
    """Goes on whatever its layer raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            result: Tensor = self.layer(x)
        except Exception:
            return x
        return result


def test_a_model_that_catches_exceptions_is_abandoned_all_the_same() -> None:
    with passes_of(Stubborn(), [torch.ones(2, 4)], own("layer")) as passes:
        assert passes.passes[0].stop == "layer"


@torch.no_grad()
def test_other_forward_passes_do_not_stop() -> None:
    model, x = mlp(), vectors(1)[0]
    expected = copy.deepcopy(model)(x)
    with passes_of(model, [x], own("0", "2")):
        assert torch.equal(model(x), expected)
