"""Sentence pairs with a score of people, from a table: what a sentence encoder is fine-tuned and tested on."""

# S = pairs, T = tokens of the longest sentence

import csv
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from tnm_pipeline.training.huggingface import Tokenization
from tnm_pipeline.training.sources import SourceError, Splits
from tnm_pipeline.training.tasks import Similarity

_Rows = list[dict[str, str]]


def load_pairs(
    source: str,
    *,
    tokenizer: str,
    max_length: int = 128,
    first: str = "sentence1",
    second: str = "sentence2",
    score: str = "score",
    scale: Sequence[float] | None = None,
    test: str | None = None,
    test_where: Mapping[str, str] | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
) -> Splits:
    """Read and tokenize pairs. The test set is named by one of `test`, `test_where` and `test_fraction`.

    Args:
        source: UTF-8 table with a header: a `.tsv` file, without quoting, or a `.csv` file.
        tokenizer: a folder or a name in the hub's cache; a run takes that of a model `hf:...` by itself.
        max_length: in tokens; longer sentences are cut.
        first: column of one sentence.
        second: column of the other.
        score: column of the score; higher is more similar.
        scale: the lowest and the highest possible score; default: those of this file's pairs.
        test: another file of the same columns.
        test_where: column -> glob; the rows that match all of them are the test set, and are not trained on.
        test_fraction: share of the rows, drawn by the seed.
        seed: of that.

    Returns:
        Tensors (S, 2, T) int64 of every name that the tokenizer gives, padded with zeros, and (S,) float32 scores on a
        scale from 0 to 1. Test pairs are in order of length.

    Raises:
        SourceError: unreadable, a column is missing, a score is no number or off the scale, no test set or no training
            set, or arguments that do not fit.
        MissingPackageError: transformers is not installed.
    """
    tokenization = Tokenization(tokenizer, max_length)
    columns = (first, second, score)
    rows = _read(Path(source), columns)
    ways = [way for way in (test, test_where, test_fraction) if way is not None]
    if len(ways) != 1:
        raise SourceError(
            f"{source} needs a test set: give one of test (another file), test_where (such as "
            '{ task = "2014*" }) and test_fraction (such as 0.1); got ' + (f"{len(ways)} of them" if ways else "none")
        )
    if test is not None:
        tested = _read(Path(test), columns)
    elif test_where is not None:
        rows, tested = _where(source, rows, test_where)
    else:
        rows, tested = _fraction(source, rows, test_fraction, seed)
    if not rows or not tested:
        raise SourceError(f"{source} gives {len(rows)} pairs to train on and {len(tested)} to test: both need some")
    low, high = _scale(source, scale, [float(row[score]) for row in [*rows, *tested]])
    train, names = _tokenized(tokenization, rows, columns, low, high)
    test_set, _ = _tokenized(tokenization, tested, columns, low, high)
    task = Similarity(names, tokenization.words())
    order = task.lengths(test_set.tensors).argsort(stable=True)  # neighbours are scored together: little padding
    return Splits(train, TensorDataset(*(tensor[order] for tensor in test_set.tensors)), task)


def _read(path: Path, columns: Sequence[str]) -> _Rows:
    """The rows of a table, with the named columns filled."""
    tabs = path.suffix == ".tsv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(
                file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
            )
            names = list(table.fieldnames or ())
            missing = [name for name in columns if name not in names]
            if missing:
                raise SourceError(
                    f"{path} has no column {', '.join(missing)}; it has {', '.join(names) or 'nothing'}: name the "
                    "columns with first, second and score"
                )
            return [_checked(path, table.line_num, row, columns) for row in table]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise SourceError(f"data file {path} cannot be read: {error}") from error


def _checked(path: Path, line: int, row: dict[str, str], columns: Sequence[str]) -> dict[str, str]:
    if None in row or None in row.values():
        raise SourceError(f"{path}, line {line}: it has more or fewer fields than the header")
    try:
        finite = math.isfinite(float(row[columns[-1]]))
    except ValueError:
        finite = False
    if not finite:
        raise SourceError(f"{path}, line {line}: {columns[-1]} is {row[columns[-1]]!r}, not a number")
    return row


def _where(source: str, rows: _Rows, where: Mapping[str, str]) -> tuple[_Rows, _Rows]:
    if not isinstance(where, Mapping):
        raise SourceError(
            f'{source}: test_where is a table of columns and globs, such as {{ task = "2014*" }}: {where!r}'
        )
    for column in where:
        if rows and column not in rows[0]:
            raise SourceError(f"{source} has no column {column} for test_where; it has {', '.join(rows[0])}")
    tested = [all(fnmatchcase(row[name], glob) for name, glob in where.items()) for row in rows]
    return (
        [row for row, is_test in zip(rows, tested, strict=True) if not is_test],
        [row for row, is_test in zip(rows, tested, strict=True) if is_test],
    )


def _fraction(source: str, rows: _Rows, fraction: float | None, seed: int) -> tuple[_Rows, _Rows]:
    if not isinstance(fraction, float) or not 0 < fraction < 1:
        raise SourceError(f"{source}: test_fraction must lie between 0 and 1, got {fraction!r}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(fraction * len(rows))
    return [rows[index] for index in order[count:]], [rows[index] for index in order[:count]]


def _scale(source: str, scale: Sequence[float] | None, scores: Sequence[float]) -> tuple[float, float]:
    found = [min(scores), max(scores)] if scale is None else scale
    two = isinstance(found, Sequence) and len(found) == 2 and all(isinstance(value, int | float) for value in found)
    if not two or not -math.inf < found[0] < found[1] < math.inf:
        raise SourceError(
            f"{source}: the scale of the scores must be [lowest, highest], got {found!r}: give two rising numbers, "
            "such as scale = [0, 5]"
        )
    low, high = found
    if min(scores) < low or max(scores) > high:
        raise SourceError(
            f"{source}: scores go from {min(scores):g} to {max(scores):g}, beyond the scale [{low:g}, {high:g}]"
        )
    return low, high


def _tokenized(
    tokenization: Tokenization, rows: _Rows, columns: Sequence[str], low: float, high: float
) -> tuple[TensorDataset, tuple[str, ...]]:
    first, second, score = columns
    tokens = tokenization.apply([row[column] for row in rows for column in (first, second)])
    names = tuple(tokens[0])
    if "attention_mask" not in names:
        raise SourceError(
            f"tokenizer {tokenization.tokenizer} gives {', '.join(names)} and no attention_mask, which tells tokens "
            "from padding"
        )
    longest = max(len(sentence["attention_mask"]) for sentence in tokens)
    inputs = [
        torch.tensor([sentence[name] + [0] * (longest - len(sentence[name])) for sentence in tokens]).reshape(
            -1, 2, longest
        )
        for name in names
    ]
    scores = torch.tensor([(float(row[score]) - low) / (high - low) for row in rows])
    return TensorDataset(*inputs, scores), names
