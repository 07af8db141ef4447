"""A conversion that is killed, and one that several processes share: the file is the same, byte for byte."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.convert.networks import ALL, conv_net, images, same_bits
from tnm_pipeline.training.convert import convert
from tnm_pipeline.training.pattern import Pattern

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from tests.training.convert.networks import ALL, conv_net, images, mlp, vectors
from tnm_pipeline.training.checkpoint import Checkpoint, save_checkpoint
from tnm_pipeline.training.convert import CalibrationError, JournalError, convert, runner
from tnm_pipeline.training.pattern import Pattern
folder, kind, last, count, other = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
rank = int(os.environ.get("RANK", 0))
if "RANK" in os.environ:
    dist.init_process_group("gloo")
if rank:
    runner.find_reorderings = None  # what it finds may depend on the machine: only the first process looks
def on_layer(name, number, of):
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
model, batches = (mlp(), vectors(count)) if kind == "mlp" else (conv_net(), images(count))
journal = folder / (other if rank else "journal") if last >= 0 else None
try:
    done = convert(model, Pattern(2, 4, transposable=True), batches, selection=ALL, journal=journal, on_layer=on_layer)
except (CalibrationError, JournalError) as error:
    (folder / f"{rank}.txt").write_text(str(error))
else:
    checkpoint = Checkpoint(model.state_dict(), done.masks, {"errors": [layer.error for layer in done.layers]})
    save_checkpoint(folder / f"{rank}.safetensors", checkpoint)
if dist.is_initialized():
    # gloo may abort a process whose work is done when its peer closes its end first. So none closes: each waits for the
    # others by files, which gloo has no part in, and leaves without tearing anything down.
    done = [folder / f"{os.getppid()}.{peer}.done" for peer in range(dist.get_world_size())]
    done[rank].touch()
    while not all(path.exists() for path in done):
        time.sleep(0.01)
    os._exit(0)
"""


def start(
    folder: Path, kind: str, last: int, count: int, launcher: list[str] | None = None, journal: str = "journal"
) -> int:
    """Convert in another process, killed after so many layers (0: never, -1: without a journal); the exit status.

    All but the first process have the journal of that name.
    """
    folder.mkdir(exist_ok=True)
    script = folder / "convert.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*(launcher or [sys.executable]), str(script), str(folder), kind, str(last), str(count), journal]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def processes(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def test_a_conversion_killed_after_a_layer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    assert start(tmp_path, "conv", 2, 2) == -signal.SIGKILL
    kept = list((tmp_path / "journal").glob("*.safetensors"))
    assert len(kept) == 4  # two layers, the batch norm between them, and the order of the channels
    assert not (tmp_path / "0.safetensors").exists()
    pattern = Pattern(2, 4, transposable=True)
    resumed, plain = conv_net(), conv_net()
    convert(resumed, pattern, images(), selection=ALL, journal=tmp_path / "journal")
    convert(plain, pattern, images(), selection=ALL)
    assert same_bits(resumed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_conversion_killed_after_any_layer_goes_on_to_the_same_file(tmp_path: Path, kind: str, last: int) -> None:
    assert start(tmp_path / "plain", kind, -1, 2) == 0
    assert start(tmp_path / "killed", kind, last, 2) == -signal.SIGKILL
    assert start(tmp_path / "killed", kind, 0, 2) == 0
    expected = (tmp_path / "plain/0.safetensors").read_bytes()
    assert (tmp_path / "killed/0.safetensors").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_two_processes_make_the_file_that_one_makes(tmp_path: Path, kind: str) -> None:
    assert start(tmp_path / "one", kind, -1, 3) == 0
    assert start(tmp_path / "two", kind, 0, 3, processes(2)) == 0
    expected = (tmp_path / "one/0.safetensors").read_bytes()
    for rank in range(2):
        assert (tmp_path / f"two/{rank}.safetensors").read_bytes() == expected
    assert start(tmp_path / "two", kind, 0, 3, processes(2)) == 0  # every layer from the journal
    assert (tmp_path / "two/1.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_more_processes_than_batches_are_refused(tmp_path: Path) -> None:
    assert start(tmp_path / "two", "mlp", -1, 1, processes(2)) == 0
    for rank in range(2):
        message = (tmp_path / f"two/{rank}.txt").read_text(encoding="utf-8")
        assert message.startswith("2 processes share 1 batches: start at most 1")


@pytest.mark.slow
def test_processes_that_do_not_share_the_journal_are_refused(tmp_path: Path) -> None:
    assert start(tmp_path, "mlp", 1, 2) == -signal.SIGKILL
    assert start(tmp_path, "mlp", 0, 2, processes(2), "elsewhere") == 0
    for rank, seen in enumerate((1, 0)):
        message = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
        assert message.startswith(f"process {rank} finds {seen} finished steps in the journal, others find 0 to 1: put")
