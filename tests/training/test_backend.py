"""Which layers are packed, when, and what the table says; on a CPU, with emulated operators where it multiplies."""

import json
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.training.kernels.emulation import TRANSPOSABLE, TWO_FOUR, Emulation, Layer
from tnm_pipeline.training import backend as backend_module
from tnm_pipeline.training.backend import BackendError, Packs, check_backend, format_table
from tnm_pipeline.training.kernels.support import why_never, why_not_now
from tnm_pipeline.training.kernels.trial import Trial
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.timing import Comparison

WINNING = Comparison(masked_ms=3.0, prepare_ms=0.1, sparse_ms=2.0, pack_ms=0.5, ratio=1.2, low=1.1, high=1.3)
LOSING = Comparison(masked_ms=3.0, prepare_ms=0.1, sparse_ms=3.0, pack_ms=0.5, ratio=0.9, low=0.8, high=1.3)


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """A CPU that counts as a GPU."""
    long = "long format"
    monkeypatch.setattr(backend_module, "why_never", lambda weight, pattern: None)
    monkeypatch.setattr(backend_module, "why_not_now", lambda weight, dtype: None if dtype == torch.bfloat16 else long)
    operators = Emulation()
    yield operators
    operators.close()


def layers() -> dict[str, Layer]:
    """Two of one shape and one of another, as a Sparsifier leaves them."""
    torch.manual_seed(0)
    parts = {name: Layer(*sides, TRANSPOSABLE) for name, sides in (("a", (32, 48)), ("b", (48, 32)), ("c", (32, 48)))}
    for layer in parts.values():
        layer.packed = None
    return parts


def train_step(
    parts: dict[str, Layer], packs: Packs, *, leak: float = 0.0, dtype: torch.dtype = torch.bfloat16, passes: int = 1
) -> None:
    optimizer = torch.optim.SGD([weight for layer in parts.values() for weight in layer.parameters()], lr=0.1)
    for _ in range(passes):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = nn.Sequential(*parts.values())(torch.randn(2, 4, 32))
        output.float().square().mean().backward()
    optimizer.step()
    packs.after_step(leak)


def filled(parts: dict[str, Layer]) -> list[bool]:
    return [layer.packed is not None and layer.packed.forward is not None for layer in parts.values()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_every_row_says_why_not() -> None:
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "auto")
    train_step(parts, packs)
    assert {(row.chosen, row.why, row.tokens, row.timing) for row in packs.table()} == {
        ("masked", "no CUDA device", None, None)
    }
    assert all(layer.packed is None for layer in parts.values())
    with pytest.warns(UserWarning, match="backend sparse: 3 of 3 layers .* masked weights, a for one: no CUDA device"):
        Packs(parts, TRANSPOSABLE, "sparse")


def test_sparse_packs_after_every_step_and_serves_every_micro_batch(gpu_like: Emulation) -> None:
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "sparse")
    assert {row.why for row in packs.table()} == {"not decided: no training step has gone through it yet"}
    train_step(parts, packs)  # masked: nothing is packed before the first step
    assert filled(parts) == [True] * 3
    assert [(row.layer, row.chosen, row.tokens) for row in packs.table()] == [(n, "sparse", 8) for n in "abc"]
    tried = gpu_like.packs, gpu_like.products
    assert tried == (2 * 2 + 3 * 2, 2 * 2)  # one trial for each of two shapes; then W and W^T of three layers
    train_step(parts, packs, passes=2)
    assert gpu_like.packs - tried[0] == 3 * 2
    assert gpu_like.products - tried[1] == 2 * (3 * 2 - 1)  # the first layer's input wants no gradient
    packs.remove()
    assert all(layer.packed is None for layer in parts.values())


@pytest.mark.parametrize(("timing", "choice"), [(WINNING, "sparse"), (LOSING, "masked")])
def test_auto_takes_what_wins_and_measures_each_shape_once(
    gpu_like: Emulation, monkeypatch: pytest.MonkeyPatch, timing: Comparison, choice: str
) -> None:
    measured: list[int] = []

    def compare(trial: Trial, micro_batches: int) -> Comparison:
        measured.append(micro_batches)
        return timing

    monkeypatch.setattr(Trial, "compare", compare)
    monkeypatch.setattr(backend_module, "library_note", lambda device: "; slow library")
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "auto", micro_batches=4)
    for _ in range(2):
        train_step(parts, packs)
    assert measured == [4, 4]
    assert [row.chosen for row in packs.table()] == [choice] * 3
    assert filled(parts) == [True] * 3
    calls = gpu_like.products
    train_step(parts, packs)
    assert gpu_like.products - calls == (5 if choice == "sparse" else 0)  # the first input wants no gradient
    why = "faster" if choice == "sparse" else "sparse is not clearly faster; slow library"
    assert {row.why for row in packs.table()} == {why}
    json.dumps([row.to_dict() for row in packs.table()])


def test_a_trial_measures_both_ways_and_leaves_no_trace(gpu_like: Emulation) -> None:
    layer, state = layers()["a"], torch.get_rng_state()
    with torch.no_grad():  # an optimizer's hook may run like this
        trial = Trial(layer.weight, layer.mask, 8, torch.bfloat16, 2)
        assert max(trial.errors()) < 1e-2
    assert max(trial.errors()) < 1e-2
    assert [tuple(tensor.shape) for tensor in trial.sparse()] == [(8, 48), (8, 32), (48, 32)]
    dense, masked, emulated = trial.dense(), trial.masked(), trial.emulated()
    assert all(torch.equal(one, other) for one, other in zip(masked, emulated, strict=True))
    assert not torch.equal(dense[0], masked[0])
    assert torch.equal(dense[2], masked[2])  # the weight gradient is the dense one
    timing = trial.compare(1)
    assert min(timing.masked_ms, timing.prepare_ms, timing.sparse_ms, timing.pack_ms) > 0
    assert layer.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_products_that_are_wrong_or_fail_are_not_used(gpu_like: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_like.product

    def wrong(dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return right(dense, packed, bias).roll(1, 0)

    def nothing(dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return right(dense, packed, bias) * float("nan")

    def failing(dense: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        raise RuntimeError("CUDA error: architecture mismatch\nand so on")

    for product, why in ((wrong, r"wrong by [12]"), (nothing, "wrong by nan"), (failing, "architecture mismatch$")):
        monkeypatch.setattr(gpu_like, "product", product)
        parts = layers()
        packs = Packs(parts, TRANSPOSABLE, "sparse")
        with pytest.warns(UserWarning, match=why):
            train_step(parts, packs)
        assert all(layer.packed is not None and layer.packed.sparse_products == 0 for layer in parts.values())
        assert {row.chosen for row in packs.table()} == {"masked"}


def test_layers_that_leak_are_masked_until_they_do_not(gpu_like: Emulation) -> None:
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "sparse")
    train_step(parts, packs, leak=1.0)
    assert filled(parts) == [False] * 3
    train_step(parts, packs)
    assert filled(parts) == [True] * 3
    train_step(parts, packs, leak=0.5)
    assert filled(parts) == [False] * 3
    train_step(parts, packs)
    assert filled(parts) == [True] * 3


def test_a_layer_that_multiplies_in_a_long_format_is_masked(gpu_like: Emulation) -> None:
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "auto")
    train_step(parts, packs, dtype=torch.float32)
    assert {(row.chosen, row.why) for row in packs.table()} == {("masked", "long format")}
    with warnings.catch_warnings(action="error"):
        train_step(parts, packs, dtype=torch.float32)


def test_a_layer_no_batch_went_through_waits(gpu_like: Emulation) -> None:
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "sparse")
    used = {name: parts[name] for name in "ab"}
    train_step(used, packs)
    assert [row.chosen for row in packs.table()] == ["sparse", "sparse", "masked"]
    assert packs.table()[2].why.startswith("not decided")
    train_step(parts, packs)
    assert [row.chosen for row in packs.table()] == ["sparse"] * 3


def test_backends_are_three() -> None:
    with pytest.raises(BackendError, match="unknown backend 'fast': choose one of auto, masked, sparse"):
        check_backend("fast")
    parts = layers()
    packs = Packs(parts, TRANSPOSABLE, "masked")
    train_step(parts, packs)
    assert {row.why for row in packs.table()} == {"asked for"}
    assert all(layer.packed is None for layer in parts.values())


@pytest.mark.parametrize(
    ("shape", "pattern", "why"),
    [
        ((32, 32), Pattern(4, 8, transposable=True), "pattern 4:8-T: the hardware multiplies 2:4"),
        ((32, 32, 3, 3), TRANSPOSABLE, "a convolution: cuSPARSELt multiplies matrices"),
        ((40, 32), TWO_FOUR, "40 x 32: both sides must be multiples of 16"),
        ((32, 40), TWO_FOUR, "32 x 40: both sides must be multiples of 16"),
    ],
)
def test_what_can_never_be_packed_is_said(shape: tuple[int, ...], pattern: Pattern, why: str) -> None:
    assert why_never(torch.zeros(shape), pattern) == why


def test_what_cannot_be_packed_now_is_said() -> None:
    class Sharded(nn.Parameter):
        pass

    assert why_not_now(torch.zeros(16, 16), torch.bfloat16) == "it is on cpu"
    why = why_not_now(Sharded(torch.zeros(16, 16)), torch.bfloat16)
    assert why == "its weight is a Sharded: only whole, plain weights are packed, no shards"


def test_the_table_is_text() -> None:
    parts = layers()
    rows = Packs(parts, TRANSPOSABLE, "masked").table()
    rows[0] = backend_module.Choice("a", (48, 32), 8192, "sparse", "faster", WINNING)
    lines = format_table(rows).splitlines()
    times = "masked ms  prepare ms  sparse ms  pack ms  times faster"
    assert lines[0] == f"layer  weight   tokens  {times}      chosen  why"
    assert (
        lines[1]
        == "a      48 x 32  8192    3.000      0.100       2.000      0.500    1.20 (1.10-1.30)  sparse  faster"
    )
    assert lines[2].endswith("masked  asked for")
