"""Unlabelled inputs from arrays and text: every example once, none changed; bad ones are named."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.unlabelled import joined, loaded, named, permutation
from tests.training.zoo import SENTENCES
from tnm_pipeline.training.drawing import Draw
from tnm_pipeline.training.sources import SourceError, digits
from tnm_pipeline.training.unlabelled import count_examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer that knows the words of the sentences, each by its rank, and marks the start."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    ranks = {word: rank for rank, word in enumerate(["[START]", "[ELSE]", *words])}
    model = Tokenizer(models.WordLevel(ranks, "[ELSE]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="[START] $A", special_tokens=[("[START]", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(str(folder))
    return str(folder)


# --- which examples, how many together


@given(st.integers(0, 70), st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_batches_have_one_size_and_leave_the_fewest_out(count: int, samples: int, batch_size: int, seed: int) -> None:
    batches = Draw(samples, batch_size, seed).batches(count)
    wanted = min(count, samples)
    indices = [index for batch in batches for index in batch]
    assert indices == permutation(count, seed)[: len(indices)].tolist()
    assert len({len(batch) for batch in batches}) == (wanted > 0)
    sizes = [size for size in range(1, batch_size + 1) if 2 * size >= min(batch_size, wanted)]
    fewest = min((wanted % size for size in sizes if size <= wanted), default=0)
    assert wanted - len(indices) == fewest
    if wanted and wanted % batch_size == 0:
        assert len(batches[0]) == batch_size


def test_the_built_in_data_gives_its_training_inputs() -> None:
    inputs = digits().train.tensors[0]
    batches = loaded("digits", samples=100, batch_size=64, seed=3)
    assert [len(batch) for batch in batches] == [50, 50]
    assert torch.equal(joined(batches), inputs[permutation(len(inputs), 3)[:100]])
    assert count_examples(batches) == 100


# --- npz


@pytest.mark.parametrize("name", ["x", "x_train"])
@pytest.mark.parametrize("dtype", ["uint8", "float64", "int64", "float16"])
def test_one_array_becomes_one_float32_input(tmp_path: Path, name: str, dtype: str) -> None:
    rows = np.arange(40).reshape(10, 4).astype(dtype)
    arrays: dict[str, Any] = {name: rows, "y": np.arange(10)}
    if name == "x_train":
        arrays |= {"y_train": np.arange(10), "x_test": rows, "y_test": rows, "extra": rows}
    np.savez(tmp_path / "a.npz", **arrays)
    result = joined(loaded(tmp_path / "a.npz", batch_size=5))
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.arange(40.0).reshape(10, 4)[permutation(10)])


def test_several_arrays_go_by_name(tmp_path: Path) -> None:
    ids = np.arange(30, dtype=np.int32).reshape(10, 3)
    arrays: dict[str, Any] = {
        "input_ids": ids,
        "bias": ids.astype(np.float64),
        "mask": ids > 4,
        "labels": np.arange(10),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    batches = named(loaded(tmp_path / "a.npz", samples=9, batch_size=3))
    rows = torch.arange(30).reshape(10, 3)[permutation(10)[:9]]
    for name, expected in {"input_ids": rows, "bias": rows.float(), "mask": rows > 4}.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)
        assert {batch[name].dtype for batch in batches} == {expected.dtype}
    assert {tuple(batch) for batch in batches} == {("input_ids", "bias", "mask")}


@pytest.mark.parametrize(
    ("y", "names"),
    [
        (np.arange(10) % 3, set()),  # one class for each example
        (np.array(["cat", "dog"] * 5), set()),
        (np.arange(20).reshape(10, 2), {"x", "y"}),
        (np.linspace(0, 1, 10), {"x", "y"}),
    ],
)
def test_a_y_beside_x_is_an_input_unless_it_holds_classes(tmp_path: Path, y: Any, names: set[str]) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((10, 4)), y=y)
    for batch in loaded(tmp_path / "a.npz", batch_size=5):
        assert (set(batch) if isinstance(batch, dict) else set()) == names


@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        ({"y": np.arange(4)}, "holds no inputs, only y: name an array x"),
        ({}, "holds no inputs, only nothing"),
        ({"x": np.ones((0, 3))}, "gives 0 examples: at least 2"),
        ({"x": np.ones((1, 3))}, "gives 1 examples: at least 2"),
        ({"x": np.array(1.0)}, r"torch.float64 of shape \(\): want real numbers, an example a row"),
        ({"x": np.ones(4, dtype=complex)}, "want real numbers"),
        ({"x": np.array(list("abcd"))}, "x holds something else than numbers"),
        ({"x": np.array([object()] * 4)}, "not a readable npz file"),
        ({"x": np.full((4, 2), np.nan)}, r"has 8 NaN or Inf of 8 values"),
        ({"x": np.full((4, 2), 1e300)}, "NaN or Inf"),  # too large for float32
        ({"x": np.ones((4, 0))}, "is empty"),
        ({"a": np.ones((4, 2)), "b": np.full(4, np.inf)}, r"batch 0 \(b\) has 4 NaN or Inf"),
        ({"a": np.ones((4, 2)), "b": np.ones((5, 2))}, "has tensors of 4, 5 examples"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], cause: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SourceError, match=cause) as caught:
        loaded(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        loaded(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(SourceError, match="not a readable npz file"):
        loaded(tmp_path / "a.npz")
    with pytest.raises(SourceError, match="takes no arguments"):
        loaded(tmp_path / "a.npz", {"size": 3})


@pytest.mark.parametrize("source", ["", "photos", "photos/", "data.json"])
def test_unknown_sources_are_refused(source: str) -> None:
    with pytest.raises(SourceError, match=r"an \.npz or \.txt file, a folder of images, hf:FOLDER_OR_NAME or module:"):
        loaded(source)


# --- text


def test_every_sentence_is_there_once_and_padding_is_short_and_masked(tmp_path: Path, tokenizer: str) -> None:
    """Expected ids by the definition of the tokenizer: the rank of each word."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n" + "\r\n \r\n".join(SENTENCES).encode() + b"\n\n")
    batches = named(loaded(tmp_path / "a.txt", {"tokenizer": tokenizer}))
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    expected = [[0, *(2 + words.index(word) for word in sentence.split())] for sentence in SENTENCES]
    rows = [
        row[real.bool()].tolist()
        for batch in batches
        for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert [len(row) for row in rows] == sorted(map(len, expected))
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert len(lengths) <= 4
        assert batch["input_ids"].shape[1] == int(lengths.max()) <= 1.3 * int(lengths.min())
        assert not batch["input_ids"][~batch["attention_mask"].bool()].any()


def test_sentences_are_chosen_by_the_seed_and_cut_at_max_length(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES), encoding="utf-8")

    def rows(seed: int) -> list[Any]:
        arguments = {"tokenizer": tokenizer, "max_length": 5}
        batches = named(loaded(tmp_path / "a.txt", arguments, samples=12, batch_size=8, seed=seed))
        return [row.tolist() for batch in batches for row in batch["input_ids"]]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    assert len(rows(0)) == 12
    assert max(map(len, rows(0))) == 5


def test_bad_text_is_refused(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "a.txt"
    for content, arguments, cause in (
        ("a\nb", {}, "needs the argument tokenizer: a folder or a name"),
        ("a\nb", {"tokenizer": tokenizer, "length": 3}, r"does not take .*'length'"),
        ("\n \n", {"tokenizer": tokenizer}, "gives 0 examples"),
        ("one", {"tokenizer": tokenizer}, "gives 1 examples"),
    ):
        path.write_text(content)
        with pytest.raises(SourceError, match=cause):
            loaded(path, arguments)
    path.write_bytes("Zürich\nGenève".encode("latin-1"))
    with pytest.raises(SourceError, match="is not UTF-8 text"):
        loaded(path, {"tokenizer": tokenizer})
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        loaded(tmp_path / "b.txt", {"tokenizer": tokenizer})


def test_packages_that_only_some_sources_need_are_not_imported() -> None:
    code = "import sys, tnm_pipeline.training.unlabelled; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "datasets", "PIL", "pydantic"} & set(done.stdout.split())
