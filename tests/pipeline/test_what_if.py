"""`inspect --what-if` against brute force: every mask tried, every group counted, nothing written."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.pipeline.conftest import Ended
from tnm_pipeline.engines import ArtifactRejected
from tnm_pipeline.pipeline.what_if import WhatIf, outcome, what_if_file
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.pattern import Pattern, PatternError

Tnm = Callable[..., Ended]
G = torch.Generator().manual_seed(0)
DENSE = torch.randn(8, 12, generator=G)
SPARSE = torch.randn(8, 8, 3, 1, generator=G) * (torch.rand(8, 8, 3, 1, generator=G) > 0.5)


def blocks_of(weight: Tensor) -> Iterator[Any]:
    """The 4 x 4 blocks of one kernel position after the other, in plain loops; sides are multiples of 4."""
    positions = weight.reshape(*weight.shape[:2], -1).double().numpy()
    for k in range(positions.shape[2]):
        for o in range(0, positions.shape[0], 4):
            for i in range(0, positions.shape[1], 4):
                yield positions[o : o + 4, i : i + 4, k]


def best_by_trying(block: Any, *, transposable: bool) -> float:
    rows = [tuple(int(j in kept) for j in range(4)) for kept in combinations(range(4), 2)]
    masks = np.array(list(product(rows, repeat=4)))
    if transposable:
        masks = masks[(masks.sum(1) == 2).all(1)]
    return float((np.abs(block) * masks).sum((1, 2)).max())


def broken_by_counting(block: Any, *, transposable: bool) -> int:
    lines = [*block, *block.T] if transposable else list(block)
    return sum(int(np.count_nonzero(line)) > 2 for line in lines)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "two.safetensors"
    save_file(
        {"a.weight": DENSE, "b.weight": SPARSE.contiguous(), "a.bias": torch.ones(8), "steps": torch.ones(4, 4).long()},
        path,
    )
    return path


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_one_weight_equals_trying_every_mask(text: str) -> None:
    pattern = Pattern.parse(text)
    for weight in (DENSE, SPARSE, DENSE.half(), DENSE[:, :8].T):
        found = outcome(weight, pattern)
        blocks = list(blocks_of(weight))
        best = sum(best_by_trying(block, transposable=pattern.transposable) for block in blocks)
        assert found.kept_magnitude == pytest.approx(best / float(weight.double().abs().sum()), rel=1e-6)
        assert found.violations == sum(broken_by_counting(b, transposable=pattern.transposable) for b in blocks)
        assert found.groups == (8 if pattern.transposable else 4) * len(blocks)


def test_edge_groups_count_as_groups() -> None:
    found = outcome(torch.ones(5, 6), Pattern(2, 4, transposable=True))
    assert found.groups == 5 * 2 + 6 * 2
    assert found.violations == 5 + 6  # the whole groups of four; those of two or one hold
    assert found.kept_magnitude == (8 + 4 + 2 + 2) / 30  # a whole block, 4 x 2, 1 x 4 and 1 x 2


def test_the_total_is_of_all_layers_as_one_weight(checkpoint: Path) -> None:
    facts = what_if_file(checkpoint, "2:4,2:4-T")
    assert [row.layer for row in facts.layers] == ["a", "b"]
    assert [row.density for row in facts.layers] == [1.0, int(SPARSE.count_nonzero()) / SPARSE.numel()]
    for index, transposable in enumerate((False, True)):
        blocks = [*blocks_of(DENSE), *blocks_of(SPARSE)]
        best = sum(best_by_trying(block, transposable=transposable) for block in blocks)
        magnitude = float(DENSE.double().abs().sum() + SPARSE.double().abs().sum())
        total = facts.total[index]
        assert total.kept_magnitude == pytest.approx(best / magnitude, rel=1e-6)
        assert total.violations == sum(broken_by_counting(block, transposable=transposable) for block in blocks)
        assert total.groups == sum(row.outcomes[index].groups for row in facts.layers)


def test_embeddings_do_not_count(tmp_path: Path) -> None:
    tensors = {"embeddings.word_embeddings.weight": DENSE + 1, "transformer.wte.weight": DENSE + 2}
    counted = {"embedding_projection.weight": DENSE, "patch_embedding.weight": SPARSE.contiguous()}
    save_file(tensors | counted, tmp_path / "text.safetensors")
    facts = what_if_file(tmp_path / "text.safetensors", "2:4")
    assert [row.layer for row in facts.layers] == ["embedding_projection", "patch_embedding"]
    assert facts.total[0].groups == sum(row.outcomes[0].groups for row in facts.layers)
    assert facts.lines[-1] == (
        "left out by their names, because no command prunes embeddings: embeddings.word_embeddings, transformer.wte"
    )
    save_file({"word_embeddings.weight": DENSE}, tmp_path / "only.safetensors")
    assert len(what_if_file(tmp_path / "only.safetensors", "2:4").lines) == 2


def test_a_weight_that_holds_the_pattern_keeps_everything(tmp_path: Path) -> None:
    tile = torch.tensor([[1.0, 2, 0, 0], [3, -4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]])
    save_file({"held.weight": tile.repeat(2, 3)}, tmp_path / "held.safetensors")
    facts = what_if_file(tmp_path / "held.safetensors", "2:4-T,1:4")
    assert (facts.total[0].kept_magnitude, facts.total[0].violations) == (1.0, 0)
    assert (facts.total[1].kept_magnitude, facts.total[1].violations) == ((2 + 4 + 6 + 8) / 36, 24)


def test_zeros_lose_nothing_and_do_not_weigh_in(tmp_path: Path) -> None:
    path = tmp_path / "zeros.safetensors"
    save_file({"zero.weight": torch.zeros(8, 8), "a.weight": DENSE}, path)
    facts = what_if_file(path, "2:4-T")
    zero = next(row for row in facts.layers if row.layer == "zero")
    assert (zero.density, zero.outcomes[0].kept_magnitude, zero.outcomes[0].violations) == (0.0, 1.0, 0)
    assert facts.total[0].kept_magnitude == pytest.approx(
        outcome(DENSE, Pattern(2, 4, transposable=True)).kept_magnitude
    )
    save_file({"zero.weight": torch.zeros(8, 8), "none.weight": torch.zeros(0, 8)}, path)
    assert what_if_file(path, "2:4-T").total[0].kept_magnitude == 1.0


def test_a_checkpoint_without_weights_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "norm.safetensors")
    facts = what_if_file(tmp_path / "norm.safetensors", "2:4")
    assert (facts.layers, facts.total[0].groups) == ((), 0)
    facts.show()
    assert "no 2-D or 4-D floating-point tensor" in capsys.readouterr().out


def test_layers_that_stay_dense_are_named(checkpoint: Path) -> None:
    lines = what_if_file(checkpoint, "2:4,4:8-T").lines
    assert lines[-1] == "inputs that 8 does not divide, which train and convert leave dense: a"
    assert not any("that 4 does not" in line for line in lines)


def test_what_is_named_twice_counts_once(checkpoint: Path) -> None:
    assert [total.pattern for total in what_if_file(checkpoint, "2:4, 2:4-T,2:4").total] == ["2:4", "2:4-T"]


@pytest.mark.parametrize("patterns", ["", "2:4,", "2-4", "2:4;2:4-T", "2:4,5:4"])
def test_a_bad_list_says_how_to_write_it(checkpoint: Path, patterns: str) -> None:
    with pytest.raises(PatternError) as caught:
        what_if_file(checkpoint, patterns)
    assert "commas" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["model.onnx", "model.plan"])
def test_other_files_are_refused_with_the_one_to_give(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ArtifactRejected, match=r"give the file that it was exported from, such as best/model"):
        what_if_file(tmp_path / name, "2:4")


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((4, 4), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        what_if_file(tmp_path / "nan.safetensors", "2:4")


def test_the_command_prints_both_ways_and_writes_nothing(tnm: Tnm, checkpoint: Path) -> None:
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.parent.rglob("*")}
    shown = tnm("inspect", checkpoint.name, "--what-if", "2:4,2:4-T")
    assert shown.code == 0, shown.err
    facts: WhatIf = what_if_file(checkpoint, "2:4,2:4-T")
    for row in facts.layers:
        assert all(f"{result.kept_magnitude:.2%}" in shown.out for result in row.outcomes)
    table = tnm("inspect", checkpoint.name, "--what-if", "2:4,2:4-T", "--json").json()
    assert table["layers"][1]["outcomes"][1] == vars(facts.layers[1].outcomes[1])
    assert [total["pattern"] for total in table["total"]] == ["2:4", "2:4-T"]
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("two.safetensors", "--what-if", "2:4,nonsense"), 2, "cannot read pattern 'nonsense'"),
        (("two.safetensors", "--what-if", "2:4", "--pattern", "4:8"), 2, "--what-if 2:4,4:8"),
        (("absent.safetensors", "--what-if", "2:4"), 3, "is no file"),
        (("small.toml", "--what-if", "2:4"), 3, "small.toml"),
    ],
)
def test_exit_codes(tnm: Tnm, checkpoint: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    assert checkpoint.exists()
    ended = tnm("inspect", *arguments)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
