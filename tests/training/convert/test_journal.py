"""Progress on disk: what is written comes back bit for bit, and only to the conversion that it belongs to."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.convert.networks import mlp, vectors, weight_of
from tnm_pipeline.training.convert.journal import Journal, JournalError, identify, remove_journal


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3, 4).T, "mask": torch.rand(4, 3) > 0.5, "bias": torch.ones(4).bfloat16()}
    record = {"name": "a.b", "error": 0.1, "damping": None, "shape": [4, 3]}
    Journal(tmp_path / "new", "identity").write("a.b", tensors, record)
    again = Journal(tmp_path / "new", "identity")
    found = again.read("a.b")
    assert found is not None
    assert found[1] == record
    assert found[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)
    assert again.read("a") is None


def test_tensors_that_share_memory_come_back_in_full(tmp_path: Path) -> None:
    bias = torch.arange(4.0)
    Journal(tmp_path, "identity").write("a", {"a.bias": bias, "b.bias": bias, "c.bias": bias[:2]}, {})
    found = Journal(tmp_path, "identity").read("a")
    assert found is not None
    assert {name: tensor.tolist() for name, tensor in found[0].items()} == {
        "a.bias": [0, 1, 2, 3],
        "b.bias": [0, 1, 2, 3],
        "c.bias": [0, 1],
    }


def test_a_kill_while_a_journal_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "progress"

    def fill() -> None:
        journal = Journal(folder, "identity")
        journal.write_start({}, {})
        journal.write("a", {}, {})

    def killed(path: Path) -> None:
        (path / "start.safetensors").unlink()
        raise KeyboardInterrupt

    fill()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_journal(folder)
    assert Journal(folder, "identity").read_start() is None  # begins anew
    fill()
    remove_journal(folder)
    assert not any(tmp_path.iterdir())


def test_names_that_differ_in_case_only_and_the_model_itself_have_files_of_their_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "identity")
    for number, name in enumerate(("layer.A", "layer.a", "")):
        journal.write(name, {"weight": torch.tensor([float(number)])}, {"number": number})
    assert len({path.name.lower() for path in tmp_path.glob("*.safetensors")}) == 3
    for number, name in enumerate(("layer.A", "layer.a", "")):
        found = journal.read(name)
        assert found is not None
        assert found[1] == {"number": number}


def test_another_conversion_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "one")
    Journal(tmp_path, "one")
    with pytest.raises(JournalError, match=r"progress of another conversion.*Remove it to start anew"):
        Journal(tmp_path, "two")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_identity_is_refused(tmp_path: Path, content: str) -> None:
    Journal(tmp_path, "one")
    [path] = tmp_path.iterdir()
    path.write_text(content)
    with pytest.raises(JournalError, match=r"conversion\.json is damaged.*remove its folder"):
        Journal(tmp_path, "one")


def test_what_a_conversion_began_with_comes_back_and_must_not_be_missing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "one")
    assert journal.read_start() is None
    journal.write("start", {"weight": torch.ones(1)}, {})
    with pytest.raises(JournalError, match=r"finished layers, but not start\.safetensors.*remove it to start anew"):
        journal.read_start()
    journal.write_start({"0.order": torch.arange(3)}, {"facts": [1]})
    found = Journal(tmp_path, "one").read_start()
    assert found is not None
    assert found[0]["0.order"].tolist() == [0, 1, 2]
    assert found[1] == {"facts": [1]}
    damage(tmp_path / "start.safetensors", "short")
    with pytest.raises(JournalError, match=r"start\.safetensors is damaged .*remove its folder to start anew"):
        journal.read_start()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "record":
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        del header["__metadata__"]["record"]
        text = json.dumps(header).ljust(size).encode()
        path.write_bytes(content[:8] + text + content[8 + size :])
    else:
        path.write_bytes({"empty": b"", "short": content[:-3], "noise": b"\xff" * len(content)}[how])


@pytest.mark.parametrize("how", ["empty", "short", "noise", "record"])
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    journal = Journal(tmp_path, "one")
    journal.write("0", {"weight": torch.ones(5)}, {})
    [path] = tmp_path.glob("*.safetensors")
    damage(path, how)
    with pytest.raises(JournalError, match=rf"{path.name} is damaged .*remove it, and the layer is converted again"):
        journal.read("0")


def test_a_conversion_is_told_by_all_that_it_depends_on() -> None:
    def identity(seed: int = 0, batches: list[Tensor] | None = None, **settings: object) -> str:
        return identify([mlp(seed), mlp()], vectors() if batches is None else batches, {"method": "admm"} | settings)

    changed = copy.deepcopy(mlp())
    with torch.no_grad():
        weight_of(changed, "4")[7, 23] += 1e-6
    named = [{"x": batch} for batch in vectors()]
    others = [
        identity(seed=1),
        identity(batches=vectors(seed=1)),
        identity(batches=vectors(2)),
        identity(batches=[x.double() for x in vectors()]),
        identity(batches=[x.reshape(32, 32) for x in vectors()]),
        identity(method="magnitude"),
        identify([changed, mlp()], vectors(), {"method": "admm"}),
        identify([mlp()], vectors(), {"method": "admm"}),
        identify([mlp(), mlp()], named, {"method": "admm"}),
    ]
    assert identity() == identity()
    assert len({identity(), *others}) == 1 + len(others)
