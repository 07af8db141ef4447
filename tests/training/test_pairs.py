"""Sentence pairs are read, split, scaled and tokenized as asked; what is wrong in a table is named by its line."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.labelled import pair_rows, write_encoder, write_pairs
from tnm_pipeline.training.huggingface import Tokenization
from tnm_pipeline.training.sources import MissingPackageError, SourceError, Splits, load_data
from tnm_pipeline.training.tasks import Similarity
from tnm_pipeline.training.unlabelled import load_calibration

ROWS = pair_rows(30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("pairs") / "bert"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.tsv", ROWS)


def load(path: Path, tokenizer: str, **arguments: Any) -> Splits:
    return load_data(str(path), {"tokenizer": tokenizer, **arguments})


def content(splits: Splits, part: str) -> list[tuple[Any, ...]]:
    """Of each pair the token ids of both sentences, without padding, and the score."""
    assert isinstance(splits.task, Similarity)
    data = getattr(splits, part)
    tensors = dict(zip(splits.task.names, data.tensors[:-1], strict=True))
    both = zip(tensors["input_ids"].flatten(0, 1), tensors["attention_mask"].flatten(0, 1), strict=True)
    found = [tuple(row[real.bool()].tolist()) for row, real in both]
    sentences = zip(found[::2], found[1::2], strict=True)
    return [(*pair, round(float(score), 4)) for pair, score in zip(sentences, data.tensors[-1], strict=True)]


def expected(tokenizer: str, rows: Sequence[Sequence[str]], low: float = 0, high: float = 5) -> list[tuple[Any, ...]]:
    ids = Tokenization(tokenizer).apply([sentence for row in rows for sentence in row[2:]])
    both = [tuple(row["input_ids"]) for row in ids]
    scores = [round((float(row[1]) - low) / (high - low), 4) for row in rows]
    return list(zip(both[::2], both[1::2], scores, strict=True))


def test_rows_that_match_are_the_test_set(table: Path, tokenizer: str) -> None:
    splits = load(table, tokenizer, test_where={"task": "2014*"})
    assert content(splits, "train") == expected(tokenizer, [row for row in ROWS if row[0] < "2014"])
    tested = expected(tokenizer, [row for row in ROWS if row[0] >= "2014"])
    assert content(splits, "test") == sorted(tested, key=lambda row: max(len(row[0]), len(row[1])))
    assert splits.train.tensors[-1].dtype == torch.float32


def test_another_file_is_the_test_set(table: Path, tokenizer: str, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "test.tsv", pair_rows(4, seed=1))
    splits = load(table, tokenizer, test=str(other))
    assert content(splits, "train") == expected(tokenizer, ROWS)
    assert sorted(content(splits, "test")) == sorted(expected(tokenizer, pair_rows(4, seed=1)))


def test_a_fraction_is_drawn_by_its_seed(table: Path, tokenizer: str) -> None:
    everything = sorted(expected(tokenizer, ROWS))
    first, again, other = (load(table, tokenizer, test_fraction=0.2, seed=seed) for seed in (0, 0, 1))
    assert len(first.test) == 6
    assert sorted(content(first, "train") + content(first, "test")) == everything
    assert content(first, "test") == content(again, "test")
    assert content(first, "test") != content(other, "test")


def test_columns_scale_and_length_can_be_named(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "like"])
        writer.writerows([['A dog, "running"', "a dog runs", 1], ["two\nlines", "the cat", 4], ["a ball", "a ball", 3]])
    columns = {"first": "a", "second": "b", "score": "like", "test_fraction": 0.34}
    scaled = load(path, tokenizer, scale=[0, 5], max_length=4, **columns)
    assert sorted(row[2] for part in ("train", "test") for row in content(scaled, part)) == [0.2, 0.6, 0.8]
    assert max(len(row[0]) for part in ("train", "test") for row in content(scaled, part)) == 4
    own = load(path, tokenizer, **columns)
    assert sorted(row[2] for part in ("train", "test") for row in content(own, part)) == [0, 0.6667, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs a test set: give one of test .* got none"),
        ({"test_fraction": 0.2, "test": "x.tsv"}, "got 2 of them"),
        ({"test_fraction": 1}, "test_fraction must lie between 0 and 1, got 1"),
        ({"test_fraction": 0.001}, "gives 30 pairs to train on and 0 to test"),
        ({"test_where": {"task": "*"}}, "gives 0 pairs to train on and 30 to test"),
        ({"test_where": {"year": "2014"}}, "has no column year for test_where; it has task, score"),
        ({"test_where": "2014"}, "test_where is a table"),
        ({"test": "nowhere.tsv"}, "data file nowhere.tsv cannot be read"),
        ({"test_fraction": 0.2, "first": "premise"}, "has no column premise; it has task, score, sentence1, sentence2"),
        ({"test_fraction": 0.2, "scale": [0, 4]}, r"scores go from 0 to 5, beyond the scale \[0, 4\]"),
        ({"test_fraction": 0.2, "scale": [5, 0]}, r"must be \[lowest, highest\], got \[5, 0\]"),
        ({"test_fraction": 0.2, "scale": [5]}, r"must be \[lowest, highest\], got \[5\]"),
        ({"test_fraction": 0.2, "scale": 5}, r"got 5: give two rising numbers, such as scale = \[0, 5\]"),
        ({"test_fraction": 0.2, "scale": "05"}, r"must be \[lowest, highest\], got '05'"),
        ({"test_fraction": 0.2, "scale": ["0", "5"]}, r"must be \[lowest, highest\], got \['0', '5'\]"),
        ({"test_fraction": 0.2, "scale": [0, 5, "x"]}, r"must be \[lowest, highest\], got \[0, 5, 'x'\]"),
        ({"test_fraction": 0.2, "scale": [0, float("inf")]}, r"must be \[lowest, highest\], got \[0, inf\]"),
        ({"test_fraction": 0.2, "length": 3}, "does not take"),
        ({"test_fraction": 0.2, "source": "x.tsv"}, "does not take .* unexpected keyword argument 'source'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    table: Path, tokenizer: str, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        load(table, tokenizer, **arguments)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2012\tgood\ta\tb", "line 32: score is 'good', not a number"),
        ("2012\tnan\ta\tb", "line 32: score is 'nan'"),
        ("2012\t3\ta", "line 32: it has more or fewer fields"),
        ("2012\t3\ta\tb\tc", "line 32: it has more or fewer fields"),
    ],
)
def test_a_broken_line_is_named(table: Path, tokenizer: str, line: str, said: str) -> None:
    table.write_text(table.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=said):
        load(table, tokenizer, test_fraction=0.2)


@pytest.mark.parametrize("bytes_", [b"", b"\xff\xfe\x00"])
def test_files_in_disguise_are_refused(table: Path, tokenizer: str, bytes_: bytes) -> None:
    table.write_bytes(bytes_)
    with pytest.raises(SourceError, match=r"it has nothing|is not UTF-8 text"):
        load(table, tokenizer, test_fraction=0.2)


def test_quotes_in_a_tsv_file_are_just_quotes(tmp_path: Path, tokenizer: str) -> None:
    rows = [("2012", "1", '"A dog', "the cat"), ("2014", "2", 'a ball"', "the cat")]
    splits = load(write_pairs(tmp_path / "quotes.tsv", rows), tokenizer, test_where={"task": "2014"})
    assert [len(splits.train), len(splits.test)] == [1, 1]


def test_a_tokenizer_is_needed(table: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"missing a required .*argument: 'tokenizer'"):
        load_data(str(table), {"test_fraction": 0.2})
    with pytest.raises(SourceError, match="neither a folder nor in the hub's cache"):
        load(table, "no/such-tokenizer", test_fraction=0.2)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(MissingPackageError, match=r"pip install 'tnm-pipeline\[hf\]'"):
        load(table, tokenizer, test_fraction=0.2)


@pytest.mark.parametrize("source", ["pairs.tsv", "users_pairs:pairs"])
def test_training_sentences_calibrate_a_conversion(
    table: Path, tokenizer: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"tokenizer": tokenizer, "test_where": {"task": "2014*"}}
    monkeypatch.chdir(table.parent)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    Path("users_pairs.py").write_text(
        "from tnm_pipeline.training.sources import load_data\n"
        "def pairs(**arguments): return load_data('pairs.tsv', arguments)\n"
    )
    batches = load_calibration(source, arguments, samples=100, batch_size=8, seed=0)
    found = [
        tuple(row[real.bool()].tolist())
        for batch in batches
        if isinstance(batch, dict)
        for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    trained = expected(tokenizer, [row for row in ROWS if row[0] < "2014"])
    assert sorted(found) == sorted(sentence for row in trained for sentence in row[:2])
