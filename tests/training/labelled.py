"""Small labelled data of the formats that training reads, and a small sentence encoder, written into folders."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.training.zoo import SENTENCES

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?", "-"]


def words_of(sentence: str) -> list[str]:
    for mark in _SPECIAL[5:]:
        sentence = sentence.replace(mark, " ")
    return sentence.lower().split()


def write_encoder(folder: Path, spread: float = 0.02) -> Path:
    """A BERT of transformers with random weights, 2 layers, 16 wide, and its tokenizer, which knows these sentences.

    Args:
        folder: to be made.
        spread: standard deviation of the weights; with that of BERT, layers of so few inputs add next to nothing.
    """
    transformers: Any = importlib.import_module("transformers")
    vocabulary = _SPECIAL + sorted({word for sentence in SENTENCES for word in words_of(sentence)})
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config.update({"initializer_range": spread, "intermediate_size": 32, "max_position_embeddings": 64})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def pair_rows(count: int = 200, seed: int = 0) -> list[tuple[str, str, str, str]]:
    """Year, score from 0 to 5, and two sentences that share as many words as the score says."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        first, other = (words_of(SENTENCES[row]) for row in draw.choice(len(SENTENCES), 2, replace=False))
        shared = int(draw.integers(0, 6))
        kept = round(len(first) * shared / 5)
        rows.append(
            (f"{2012 + index % 3}.made-up", str(shared), " ".join(first), " ".join(first[:kept] + other[kept:]))
        )
    return rows


def write_pairs(path: Path, rows: Sequence[Sequence[str]] | None = None) -> Path:
    lines = ["task\tscore\tsentence1\tsentence2", *("\t".join(row) for row in rows or pair_rows())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, train: int = 20, test: int = 8, side: int = 8) -> Path:
    """Two classes of pictures with noise: the left half bright, or the right one."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, bright in (("left", slice(None, side // 2)), ("right", slice(side // 2, None))):
            target = folder / split / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 128, (side, side, 3), dtype=np.uint8)
                pixels[:, bright] += 100
                Image.fromarray(pixels).save(target / f"{index:04}.png")
    return folder
