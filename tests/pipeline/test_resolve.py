"""Which model and data a command is about, and whose word is taken for it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.resolve import DEMO, check_checkpoint, resolve
from tnm_pipeline.training.checkpoint import Checkpoint, CheckpointError, save_checkpoint

BUILT_IN = {"source": "digits-mlp", "args": {"hidden": 8}}
FOREIGN = {"source": "theirs:model", "args": {}}
DATA = {"source": "digits", "args": {}}


def written(path: Path, record: dict[str, Any]) -> Path:
    save_checkpoint(path, Checkpoint({"weight": torch.zeros(4, 4)}, record=record))
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return written(tmp_path / "ours.safetensors", {"model": BUILT_IN, "data": DATA})


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return written(tmp_path / "foreign.safetensors", {"model": FOREIGN, "data": DATA})


def test_a_checkpoint_remembers_built_in_sources(ours: Path) -> None:
    config = resolve(None, [], {}, remembers=ours)
    assert (config.model.source, config.model.args, config.data.source) == ("digits-mlp", {"hidden": 8}, "digits")


def test_what_the_user_says_wins(ours: Path) -> None:
    config = resolve(None, ["model.args.channels=2"], {"model.source": "digits-cnn"}, remembers=ours)
    assert (config.model.source, config.model.args) == ("digits-cnn", {"channels": 2})


@pytest.mark.parametrize(
    ("override", "options", "said"),
    [
        ("trt.enabled=true", {"trt.enabled": False}, "enabled = true would be ignored: --trt decides it, here false"),
        ("trt = { enabled = true }", {"trt.enabled": False}, "--trt decides it"),
        ('run.routes=["foo"]', {"run.routes": ["train"]}, "the command .`tnm-pipeline run` takes run.routes. decides"),
        ("sparsity.pattern=4:8", {"sparsity.pattern": "2:4"}, "--pattern decides it"),
    ],
)
def test_what_would_be_ignored_is_refused(ours: Path, override: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(None, [override], options, remembers=ours)
    agreed = dict.fromkeys(options)
    resolve(None, ["trt.enabled=true", "sparsity.pattern=4:8"], agreed, remembers=ours)
    resolve(None, ["trt.enabled=false"], {"trt.enabled": False}, remembers=ours)


def test_what_is_no_checkpoint_at_the_first_look(tmp_path: Path) -> None:
    model = tmp_path / "tinybert" / "model.safetensors"
    model.parent.mkdir()
    model.touch()
    arrays = tmp_path / "data.npz"
    arrays.touch()
    for path, said in (
        (model.parent, f"tinybert is a folder: give {model}"),
        (tmp_path / "absent.pt", "does not exist"),
        (arrays, "is an .npz of arrays, not a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            resolve(None, [], {"model.checkpoint": str(path)})
    (model.parent / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a folder: give the file in it that holds the weights"):
        check_checkpoint(model.parent)


def test_code_that_only_a_file_names_is_not_trusted(foreign: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model theirs:model or --trust-source"):
        resolve(None, [], {}, remembers=foreign)
    assert resolve(None, [], {}, remembers=foreign, trust_source=True).model.source == "theirs:model"
    assert resolve(None, [], {"model.source": "theirs:model"}, remembers=foreign).model.source == "theirs:model"


@pytest.mark.parametrize("section", ["model", "data"])
def test_nobody_says_which(section: str) -> None:
    other = {"model": "data", "data": "model"}[section]
    with pytest.raises(ConfigError, match=f"which {section}\\?"):
        resolve(None, [f"{other}.source=digits"], {})


def test_what_hugging_face_holds_is_no_code(tmp_path: Path) -> None:
    path = written(tmp_path / "hub.safetensors", {"model": {"source": "hf:some/model", "args": {}}, "data": DATA})
    assert resolve(None, [], {}, remembers=path).model.source == "hf:some/model"


def test_unlabelled_inputs_will_do_for_a_conversion_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "unlabelled.safetensors", {"model": BUILT_IN, "data": {"source": "", "args": {}}})
    given = {"calibration.source": "x.npz"}
    assert not resolve(None, [], given, remembers=path, needs_labels=False).labelled
    with pytest.raises(ConfigError, match=r"which data\?.*or --calibration"):
        resolve(None, [], {}, remembers=path, needs_labels=False)
    with pytest.raises(ConfigError, match=r"which data\?(?!.*--calibration)"):
        resolve(None, [], given, remembers=path)


@pytest.mark.parametrize("record", [None, [], 3, "x", {"model": 3}, {"model": {}}, {"model": {"source": 3}}])
def test_a_record_that_makes_no_sense_says_nothing(tmp_path: Path, record: object) -> None:
    header = json.dumps({"__metadata__": {"tnm_pipeline": json.dumps(record)}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match="which model"):
        resolve(None, [], {}, remembers=path)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 64, b"\x05" + b"\0" * 7 + b"hello"])
def test_a_broken_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="which model"):
        resolve(None, [], {}, remembers=path)


@pytest.mark.parametrize("key", ["model.checkpoint", "export.checkpoint"])
@pytest.mark.parametrize(("name", "said"), [("absent.safetensors", "does not exist"), (".", "is a folder")])
def test_a_checkpoint_that_is_not_there(key: str, name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve(DEMO, [], {key: name})
