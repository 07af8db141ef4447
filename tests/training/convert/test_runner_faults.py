"""convert() when data, models or journals are odd: a clear message or a reported fallback, finished layers kept."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import (
    ALL,
    Backwards,
    conv_net,
    images,
    mlp,
    same_bits,
    vectors,
    violations,
    weight_of,
)
from tests.training.zoo import SMALL
from tnm_pipeline.training.convert import METHODS, CalibrationError, JournalError, convert, runner
from tnm_pipeline.training.convert.reorder import Reordering, reorder
from tnm_pipeline.training.convert.rotation import Rotation
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection

QUICK = [name for name in METHODS if name != "adaprune"]  # whose thousand steps are tested elsewhere


@pytest.mark.parametrize("values", ["constant", "zero", "one sample", "few samples"])
@pytest.mark.parametrize("method", QUICK)
def test_data_that_says_little_is_reported_and_harms_nothing(method: str, values: str) -> None:
    batches = {
        "constant": [torch.full((8, 16), 0.7)] * 2,
        "zero": [torch.zeros(8, 16)],
        "one sample": vectors(1, examples=1),
        "few samples": vectors(1, examples=5),
    }[values]
    model = mlp()
    conversion = convert(model, Pattern(2, 4), batches, method=method, selection=ALL)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    for layer in conversion.layers:
        assert violations(weight_of(model, layer.name), Pattern(2, 4)) == 0
        assert min(layer.samples, layer.live_inputs) < layer.gemm_shape[1] or values == "constant"
        assert layer.samples == sum(len(batch) for batch in batches)
        assert layer.error <= layer.error_masked or method == "magnitude"
        assert layer.error < 0.01 or values == "few samples"  # a bias alone can do it
    outputs = model(torch.cat(batches))
    if values != "few samples":
        torch.testing.assert_close(outputs, mlp()(torch.cat(batches)), rtol=1e-2, atol=1e-3)


class Branching(nn.Module):
    """A residual block that some batches skip, and experts that are given some examples of a batch, or none."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.block, self.a, self.b, self.last = (nn.Linear(16, 16) for _ in range(5))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if float(x[0, 0]) > 0:
            h = h + self.block(h) if self.residual else self.block(h)
        chosen = x[:, 1] > 0
        y = torch.zeros_like(h)
        y[chosen], y[~chosen] = self.a(h[chosen]), self.b(h[~chosen])
        result: Tensor = self.last(y)
        return result


@pytest.mark.parametrize(
    "residual",
    [
        False,
        True,
    ],
)
def test_layers_that_run_on_some_examples_only_are_fitted_to_these(residual: bool) -> None:
    batches = vectors(4, seed=3)
    for number, batch in enumerate(batches):
        batch[0, 0] = 1.0 if number == 0 else -1.0 if number == 3 else batch[0, 0].abs()
    batches[1][:, 1] = 1.0
    conversion = convert(Branching(residual=residual), Pattern(2, 4), batches, selection=ALL)
    samples = {layer.name: layer.samples for layer in conversion.layers}
    chosen = sum(int((batch[:, 1] > 0).sum()) for batch in batches)
    assert samples == {"first": 256, "block": 192, "a": chosen, "b": 256 - chosen, "last": 256}
    assert all(layer.error < layer.error_masked for layer in conversion.layers)


def test_a_layer_called_twice_counts_twice() -> None:
    model = Backwards()
    conversion = convert(model, Pattern(2, 4), vectors(width=8), selection=ALL)
    assert [(layer.name, layer.samples) for layer in conversion.layers] == [
        ("first", 192),
        ("twice", 384),
        ("last", 192),
    ]


class Faulty(nn.Module):
    """Fails between its layers on inputs that begin with a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[:3](x)
        if float(x[0, 0]) > 50:
            raise RuntimeError("out of range")
        result: Tensor = self.layers[3:](h)
        return result


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_fails_midway_keeps_what_is_finished(tmp_path: Path, workers: int) -> None:
    batches = vectors(3)
    batches[1][0, 0] = 100.0
    threads = set(threading.enumerate())
    message = (
        r"fails on the calibration data after layer layers\.2: RuntimeError: out of range; finished layers kept: 1"
    )
    with pytest.raises(CalibrationError, match=message):
        convert(Faulty(), Pattern(2, 4), batches, selection=ALL, journal=tmp_path, workers=workers)
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.safetensors")} == {"start.safetensors", "layers.0"}
    assert set(threading.enumerate()) <= threads
    with pytest.raises(CalibrationError, match=r"RuntimeError: out of range$"):
        convert(Faulty(), Pattern(2, 4), batches, selection=ALL)


def test_an_overflow_names_the_layer_and_keeps_what_is_finished(tmp_path: Path) -> None:
    model = mlp()
    weight_of(model, "2").fill_(float("inf"))
    with pytest.raises(CalibrationError, match="layer 4 meets NaN or Inf"):
        convert(model, Pattern(2, 4), vectors(), selection=Selection(exclude=("2",), keep_last=False), journal=tmp_path)
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.safetensors")} == {"start.safetensors", "0"}


def test_a_journal_spares_the_finished_layers_and_changes_no_bit(tmp_path: Path) -> None:
    plain, first, second = conv_net(), conv_net(), conv_net()
    expected = convert(plain, Pattern(2, 4), images(), selection=ALL)
    convert(first, Pattern(2, 4), images(), selection=ALL, journal=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 6  # three layers, a batch norm, the order of the channels, and what they belong to
    found = convert(second, Pattern(2, 4), images(), selection=ALL, journal=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert same_bits(plain, first)
    assert same_bits(plain, second)
    assert [(one.name, one.error) for one in found.layers] == [(one.name, one.error) for one in expected.layers]
    assert found.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in found.masks.items())


def test_a_conversion_goes_on_in_the_bases_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = SMALL["bert"]
    batches = [inputs(16, seed) for seed in range(2)]

    def stop(_: str, number: int, __: int) -> None:
        if number == 3:
            raise InterruptedError

    plain, killed, resumed = build(), build(), build()
    expected = convert(plain, Pattern(2, 4), batches, selection=ALL)
    assert {type(one) for one in expected.reorderings} == {Reordering, Rotation}
    with pytest.raises(InterruptedError):
        convert(killed, Pattern(2, 4), batches, selection=ALL, journal=tmp_path, on_layer=stop)
    monkeypatch.setattr(runner, "find_reorderings", lambda *_: [])  # as another machine might
    found = convert(resumed, Pattern(2, 4), batches, selection=ALL, journal=tmp_path)
    assert same_bits(resumed, plain)
    assert [one.to_dict() for one in found.reorderings] == [one.to_dict() for one in expected.reorderings]
    rotated = build()
    reorder(rotated, found.reorderings)
    reorder(other := build(), expected.reorderings)
    assert same_bits(rotated, other)


def test_a_journal_of_another_conversion_is_refused(tmp_path: Path) -> None:
    convert(mlp(), Pattern(2, 4), vectors(), journal=tmp_path)
    two_four = Pattern(2, 4)
    changes = [
        (mlp(), Pattern(1, 4), vectors(), {}),
        (mlp(seed=1), two_four, vectors(), {}),
        (mlp(), two_four, vectors(seed=1), {}),
        (mlp(), two_four, vectors(), {"method": "magnitude"}),
        (mlp(), two_four, vectors(), {"sequential": False}),
    ]
    for model, pattern, batches, settings in changes:
        with pytest.raises(JournalError, match="progress of another conversion"):
            convert(model, pattern, batches, journal=tmp_path, **settings)  # type: ignore[arg-type]  # one of several


def test_a_damaged_journal_file_is_named(tmp_path: Path) -> None:
    convert(mlp(), Pattern(2, 4), vectors(), selection=ALL, journal=tmp_path)
    [path] = tmp_path.glob("2-*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(JournalError, match=rf"{path.name} is damaged"):
        convert(mlp(), Pattern(2, 4), vectors(), selection=ALL, journal=tmp_path)
    path.unlink()
    again, plain = mlp(), mlp()
    convert(again, Pattern(2, 4), vectors(), selection=ALL, journal=tmp_path)
    convert(plain, Pattern(2, 4), vectors(), selection=ALL)
    assert same_bits(again, plain)


class Repeating(nn.Module):
    """Runs its layers as often as a batch says."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, rounds: Tensor) -> Tensor:
        for _ in range(int(rounds[0])):
            x = self.second(self.first(x).relu()).relu()
        result: Tensor = self.last(x)
        return result


def test_a_layer_that_comes_back_after_its_conversion_asks_for_the_dense_model() -> None:
    def batches(*rounds: int) -> list[tuple[Tensor, Tensor]]:
        return [(x, torch.full((64,), count)) for x, count in zip(vectors(2), rounds, strict=True)]

    with pytest.raises(
        CalibrationError, match="layer first runs more often on one calibration batch than on the first"
    ):
        convert(Repeating(), Pattern(2, 4), batches(1, 2), selection=ALL)
    given = convert(Repeating(), Pattern(2, 4), batches(1, 2), selection=ALL, reference=Repeating())
    assert [layer.name for layer in given.layers] == ["first", "second", "last"]
    own, given = (
        convert(Repeating(), Pattern(2, 4), batches(2, 3), selection=ALL, reference=reference)
        for reference in (None, Repeating())
    )
    assert [layer.error for layer in own.layers] == [layer.error for layer in given.layers]
