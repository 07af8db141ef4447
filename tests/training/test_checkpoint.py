"""Checkpoints: what is written comes back, and what is bad is refused without being run."""

import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_into,
    read_checkpoint,
    save_checkpoint,
)
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7))


def checkpoint(seed: int = 0) -> Checkpoint:
    model = net(seed)
    masks = {
        name: solve(model.get_parameter(f"{name}.weight"), Pattern(2, 4, transposable=True)) for name in ("0", "3")
    }
    return Checkpoint(model.state_dict(), masks, {"model": {"source": "a:b"}, "pattern": "2:4-T"})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    return message


class Payload:
    """A pickle that creates a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


# --- what is written comes back


def test_round_trip(tmp_path: Path) -> None:
    path, written = tmp_path / "new folder" / "mit Leerzeichen é.safetensors", checkpoint()
    save_checkpoint(path, written)
    read = read_checkpoint(path)
    assert read.record == written.record
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())
    assert read.masks.keys() == written.masks.keys()
    assert all(torch.equal(read.masks[name], mask) for name, mask in written.masks.items())
    assert list(path.parent.iterdir()) == [path]
    model = net(seed=1)
    load_into(model, read, path)
    assert all(torch.equal(written.tensors[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, Checkpoint({"w": torch.tensor([1.5, -2.0], dtype=dtype), "n": torch.tensor(3)}))
    read = read_checkpoint(path).tensors
    assert read["w"].dtype == dtype
    assert read["n"].dtype == torch.int64
    assert read["n"].shape == ()


def test_weights_of_8_bits_are_read_into_a_model_of_32(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", nn.Linear(2, 2, bias=False)
    save_checkpoint(path, Checkpoint({"weight": torch.tensor([[1.5, -2.0], [0.0, 448.0]]).to(torch.float8_e4m3fn)}))
    load_into(model, read_checkpoint(path), path)
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [[1.5, -2.0], [0.0, 448.0]]
    save_checkpoint(path, Checkpoint({"weight": torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)}))
    assert "NaN or Inf in weight" in refusal(path)


def test_weights_of_4_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    assert "4-bit floats in w, which torch only stores: dequantize first" in refusal(path)


def test_tied_weights_and_views_are_written_in_full(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    base = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(path, Checkpoint({"a": base, "b": base, "row": base[1], "turned": base.T}))
    read = read_checkpoint(path).tensors
    assert torch.equal(read["a"], base)
    assert torch.equal(read["b"], base)
    assert torch.equal(read["row"], base[1])
    assert torch.equal(read["turned"], base.T)


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from tnm_pipeline.training.checkpoint import Checkpoint, save_checkpoint\n"
        "facts = {name: len(name) for name in {'alpha', 'beta', 'gamma', 'delta', 'epsilon'}}\n"
        "tensors = {name: torch.full((4, 4), float(size)) for name, size in facts.items()}\n"
        "masks = {'l': torch.ones(4, 4, dtype=torch.bool)}\n"
        "save_checkpoint(Path(sys.argv[1]), Checkpoint(tensors | {'l.weight': torch.ones(4, 4)}, masks, facts))\n"
    )
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        subprocess.run([sys.executable, "-c", script, file], check=True, env=os.environ | {"PYTHONHASHSEED": str(seed)})
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_foreign_safetensors_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    read = read_checkpoint(path)
    assert torch.equal(read.tensors["w"], torch.ones(2))
    assert read.masks == {}
    assert read.record == {}


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_torch_file_with_tensors_only_is_read(tmp_path: Path, key: str | None, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    state = net().state_dict()
    torch.save({key: state, "epoch": 3} if key else state, path)
    read = read_checkpoint(path).tensors
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


# --- files that hold code


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "a.pt", tmp_path / "created"
    torch.save({"w": torch.ones(2), "payload": Payload(target)}, path)
    assert "not opened" in refusal(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the payload is real
    assert target.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_legacy_pickle_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    path, target = tmp_path / f"a{suffix}", tmp_path / "created"
    path.write_bytes(pickle.dumps(Payload(target)))
    assert "legacy pickle" in refusal(path)
    torch.save({"payload": Payload(target)}, path, _use_new_zipfile_serialization=False)
    assert "legacy pickle" in refusal(path)
    assert not target.exists()


def test_a_pickle_with_a_zip_appended_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "a.pt", tmp_path / "created"
    path.write_bytes(pickle.dumps(Payload(target)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"")
    refusal(path)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # deprecated, yet such files are around
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(nn.Linear(4, 4)), path)
    assert "TorchScript" in refusal(path)


def test_a_torch_export_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.ones(1, 4),)), path)
    assert "torch.export" in refusal(path)


# --- files that are not what they say


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("start", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    ],
)
def test_files_in_disguise(tmp_path: Path, suffix: str, start: bytes, cause: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(start)
    assert cause in refusal(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "no.safetensors")
    (tmp_path / "folder.pt").mkdir()
    refusal(tmp_path / "folder.pt")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    if suffix == ".safetensors" or keep:  # of an empty .pt nobody can tell
        assert "again" in message


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < plain.stat().st_size / 100
    assert "zip bomb" in refusal(bomb)


def test_a_tensor_that_unfolds_to_terabytes_is_refused(tmp_path: Path) -> None:
    """One stored element with stride 0: nothing is compressed, and a check for NaN would allocate it all."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(1).expand(1 << 42)}, path)
    assert path.stat().st_size < 10_000
    assert "claims 4398046511104 elements" in refusal(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2), {"state_dict": {"w": 1}}])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert "does not hold a state_dict" in refusal(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"layer{i}": torch.full((2,), bad, dtype=dtype) for i in range(7)} | {"good": torch.ones(2)}
    save_checkpoint(path, Checkpoint(tensors))
    message = refusal(path)
    assert "NaN or Inf in layer0; layer1; layer2; layer3; layer4; and 2 more" in message
    assert "good" not in message.split("NaN or Inf in")[1].split(":")[0]


# --- our own record and masks, damaged


def write_ours(path: Path, record: str, **extra: torch.Tensor) -> None:
    save_file({"l.weight": torch.ones(4, 4)} | extra, path, metadata={"tnm_pipeline": record})


@pytest.mark.parametrize("record", ["{", "", "[1]", "3", "null"])
def test_a_corrupt_record_is_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "a.safetensors"
    write_ours(path, record)
    refusal(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_ours(path, json.dumps({"schema": 99}))
    assert "another version" in refusal(path)


def test_a_mask_whose_layer_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_ours(path, json.dumps({"schema": 1}), **{"mask/gone": torch.zeros(2, dtype=torch.uint8)})
    assert "mask for gone but no gone.weight" in refusal(path)


@pytest.mark.parametrize("bits", [torch.zeros(1, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.zeros(2)])
def test_a_mask_of_the_wrong_size_is_refused(tmp_path: Path, bits: torch.Tensor) -> None:
    path = tmp_path / "a.safetensors"
    write_ours(path, json.dumps({"schema": 1}), **{"mask/l": bits})
    assert "16 weights need uint8 (2,)" in refusal(path)


# --- a checkpoint for another model


def test_keys_and_shapes_that_do_not_fit_are_named_with_the_closest(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {
        "encoder.weights": torch.ones(4, 4),
        "encoder.bias": torch.ones(4),
        "head.weight": torch.ones(3, 4),
        "head.bias": torch.ones(2),
    }
    with pytest.raises(CheckpointError) as caught:
        load_into(model, Checkpoint(given), tmp_path / "a.pt")
    message = str(caught.value)
    assert "encoder.weight is missing (closest: encoder.weights)" in message
    assert "encoder.weights is not in the model" in message
    assert "head.weight has shape (3, 4), the model wants (2, 4)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"; and 9 more\. Is it"):
        load_into(net(), Checkpoint({f"x{i}": torch.ones(1) for i in range(5)}), tmp_path / "a.pt")


# --- atomic writes


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, checkpoint())
    old = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, Checkpoint({"w": torch.ones(2)}, record={"not json": object()}))
    assert path.read_bytes() == old


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, checkpoint())
    old = path.read_bytes()
    size = 256 << 20
    script = (
        "import sys; from pathlib import Path\n"
        "from tnm_pipeline.training.atomic import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), bytes(int(sys.argv[2])))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path, str(size)]) as process:
        while not any(0 < file.stat().st_size < size for file in tmp_path.glob("*.tmp")):
            assert process.poll() is None, "the write was over before it was seen"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    save_checkpoint(path, checkpoint(seed=1))  # what the kill left beside it is no obstacle
    assert torch.equal(read_checkpoint(path).tensors["3.weight"], checkpoint(seed=1).tensors["3.weight"])


def test_atomic_write_makes_parent_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]
