"""Models and data by name, from files and from a user's module; bad ones are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tnm_pipeline.training.sources import DATA, MODELS, SourceError, Splits, load_data, load_model

USER_MODULE = """
import numpy as np, torch
from torch import nn
from torch.utils.data import TensorDataset
from tnm_pipeline.training.sources import Splits

number = 3

def model(width=8):
    return nn.Linear(4, width)

def not_a_model():
    return "model"

def arrays(samples=6):
    x = np.ones((samples, 4), dtype=np.float64)
    y = np.arange(samples) % 2
    return x, y, x[:2], y[:2]

def splits():
    data = TensorDataset(torch.ones(3, 4), torch.tensor([0, 1, 0]))
    return Splits(data, data)

def three():
    return arrays()[:3]

def broken():
    return len(3)
"""


def arrays(**changes: Any) -> dict[str, Any]:
    inputs = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    targets = np.array([0, 1, 2, 0, 1, 2])
    return {"x_train": inputs, "y_train": targets, "x_test": inputs[:3], "y_test": targets[:3]} | changes


def written(path: Path, content: dict[str, Any]) -> str:
    np.savez(path, **content)
    return str(path)


# --- built in


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models_take_the_built_in_data(name: str) -> None:
    images, _ = load_data("digits", {}).test[:5]
    assert load_model(name, {})(images).shape == (5, 10)


def test_arguments_reach_the_model() -> None:
    small, large = load_model("digits-mlp", {"hidden": 4}), load_model("digits-mlp", {"hidden": 8})
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters())


def test_digits_are_all_there_once() -> None:
    data = load_data("digits", {})
    inputs, targets = (torch.cat(parts) for parts in zip(data.train.tensors, data.test.tensors, strict=True))
    assert inputs.shape == (1797, 1, 8, 8)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)
    assert sorted(set(targets.tolist())) == list(range(10))
    assert len(data.test) == 450
    assert set(DATA) == {"digits"}


@pytest.mark.parametrize("load", [load_model, load_data])
@pytest.mark.parametrize("source", ["digit", "", ":f", ".a:f", "a b:f", "data.txt"])
def test_unknown_names_are_refused(load: Any, source: str) -> None:
    with pytest.raises(SourceError, match=r"unknown .* source"):
        load(source, {})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(SourceError, match=r"does not take.*'depth'"):
        load_model("digits-mlp", {"depth": 3})


# --- module:function


def test_a_user_module_in_the_current_folder(user_module: str) -> None:
    model = load_model(f"{user_module}:model", {"width": 3})
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    data = load_data(f"{user_module}:arrays", {"samples": 10})
    assert len(data.train) == 10
    assert data.train.tensors[0].dtype == torch.float32
    assert data.train.tensors[1].dtype == torch.int64
    assert isinstance(load_data(f"{user_module}:splits", {}), Splits)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("missing", "cannot import"),
        ("number", "is a int, not a function"),
        ("not_a_model", "returned a str"),
    ],
)
def test_bad_functions_are_refused(user_module: str, function: str, cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        load_model(f"{user_module}:{function}", {})


def test_a_missing_module_is_refused() -> None:
    with pytest.raises(SourceError, match="cannot import model source 'no_such_module:f'"):
        load_model("no_such_module:f", {})


def test_data_of_another_form_is_refused(user_module: str) -> None:
    with pytest.raises(SourceError, match=r"returned a tuple: return Splits, or the tuple \(x_train"):
        load_data(f"{user_module}:three", {})


def test_an_error_inside_the_users_function_is_the_users(user_module: str) -> None:
    """A TypeError in there is no wrong argument; the traceback of the cause says where."""
    with pytest.raises(SourceError, match=r"raised TypeError: .* has no len") as caught:
        load_model(f"{user_module}:broken", {})
    assert isinstance(caught.value.__cause__, TypeError)
    Path("syntax_error_here.py").write_text("def f(:")
    with pytest.raises(SourceError, match=r"cannot import .* SyntaxError"):
        load_model("syntax_error_here:f", {})


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="every train target is 2"):
        load_data(written(tmp_path / "one.npz", arrays(y_train=np.full(6, 2))), {})


# --- npz


def test_an_npz_file(tmp_path: Path) -> None:
    content = arrays(x_train=np.arange(24, dtype=np.uint8).reshape(6, 4))
    data = load_data(written(tmp_path / "ä b.npz", content), {})
    assert torch.equal(data.train.tensors[0], torch.arange(24.0).reshape(6, 4))
    assert data.train.tensors[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(data.test) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_labels_may_be_integers_of_any_type(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2], dtype=dtype)
    data = load_data(written(tmp_path / "a.npz", arrays(y_train=labels, y_test=labels[:3])), {})
    for part, values in ((data.train, labels), (data.test, labels[:3])):
        assert part.tensors[1].dtype == torch.int64
        assert part.tensors[1].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"x_train": np.full((6, 4), np.nan)}, "train inputs contain NaN or Inf"),
        ({"x_test": np.full((3, 4), np.inf)}, "test inputs contain NaN or Inf"),
        ({"x_train": np.full((6, 4), 1e300)}, "train inputs contain NaN or Inf"),  # too large for float32
        ({"y_train": np.ones(6)}, r"must be class indices of shape \(S,\), got torch.float64 \(6,\)"),
        ({"y_train": np.ones(6, dtype=complex)}, r"class indices of shape \(S,\), got torch.complex128 \(6,\)"),
        ({"y_train": np.eye(6, dtype=int)}, r"got torch.int64 \(6, 6\)"),
        ({"y_train": np.array([0, 1, -1, 0, 1, 2])}, "target -1: class indices start at 0"),
        ({"y_train": np.array(0)}, r"got torch.int64 \(\)"),
        ({"y_test": np.array([0, 1])}, r"test has inputs \(3, 4\) and 2 targets"),
        ({"x_test": np.ones((0, 4)), "y_test": np.ones(0, dtype=int)}, "0 targets"),
        ({"x_train": np.array(1.0)}, "6 targets"),
        ({"y_train": np.array(list("abcdef"))}, "something else than numbers"),
        ({"y_train": np.array([object()] * 6)}, "not a readable npz file"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    source = written(tmp_path / "a.npz", arrays(**changes))
    with pytest.raises(SourceError, match=cause) as caught:
        load_data(source, {})
    assert source in str(caught.value)


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    content = arrays()
    del content["x_test"], content["y_test"]
    with pytest.raises(SourceError, match="lacks x_test, y_test; it has x_train, y_train"):
        load_data(written(tmp_path / "a.npz", content), {})


def test_a_missing_file_and_arguments_for_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        load_data(str(tmp_path / "no.npz"), {})
    with pytest.raises(SourceError, match="takes no arguments"):
        load_data(written(tmp_path / "a.npz", arrays()), {"samples": 3})


def test_files_in_disguise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    whole = Path(written(path, arrays())).read_bytes()
    np.save(tmp_path / "a.npy", np.ones(3))
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    for content in (b"", b"hello", whole[:100], bytes(flipped), (tmp_path / "a.npy").read_bytes(), b"<html>"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match="not a readable npz file"):
            load_data(str(path), {})
