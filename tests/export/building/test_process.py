"""The building process killed, crashed, starved and abandoned: one exception each, and nothing left behind."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.export.graphs import products
from tnm_pipeline.export.building import outcome, process
from tnm_pipeline.export.building.process import Ending
from tnm_pipeline.export.building.progress import BuildProgress
from tnm_pipeline.export.errors import BuildFailed, BuildOutOfMemory
from tnm_pipeline.export.tensorrt import BuildOptions, available_builders, build_plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
SETTINGS: dict[str, Any] = {
    "sparse": True,
    "precision": "fp32",
    "sparsity": {},
    "backend": "tensorrt_rtx",
    "compute_capabilities": ("8.9",),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return products(tmp_path / "m.onnx")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, as they are started."""
    processes: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]  # of bytes, like what it stands for
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes


def in_the_middle(action: str) -> tuple[str, ...]:
    """A building process that does `action` when the builder has done its first step, inside of the build."""
    code = f"""
import os, signal, time
from tnm_pipeline.export.building import child

send = child._Channel.send

def send_and_act(self, *event):
    send(self, *event)
    if event[0] == "step":
        {action}

child._Channel.send = send_and_act
child.main()
"""
    return (sys.executable, "-c", code)


def signalled(name: str) -> tuple[str, ...]:
    return in_the_middle(f"os.kill(os.getpid(), signal.{name})")


def limited(monkeypatch: pytest.MonkeyPatch, kib: int) -> None:
    """Let building processes have at most `kib` KiB of address space."""
    shell = ("sh", "-c", f'ulimit -v {kib}; exec "$@"', "sh")
    monkeypatch.setattr(process, "_COMMAND", (*shell, *process._COMMAND))


def left_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name != "m.onnx"]


@needs_posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_killed_in_the_middle(
    name: str, graph: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_COMMAND", signalled(name))
    with pytest.raises(BuildFailed, match=rf"(?s)ended with {name}\..*it read is leave \(Cast\)") as caught:
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS)
    assert not isinstance(caught.value, BuildOutOfMemory)
    (ended,) = started
    assert ended.returncode == -getattr(signal, name)  # waited for: no zombie
    assert not left_in(graph.parent)


@needs_posix
def test_ctrl_c_is_left_to_the_one_that_asked(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to both, and the caller may want to end the step in peace."""
    monkeypatch.setattr(process, "_COMMAND", signalled("SIGINT"))
    build_plan(graph, graph.with_name("m.plan"), **SETTINGS)
    assert sorted(left_in(graph.parent)) == ["m.plan", "m.plan.manifest.json"]


@needs_posix
def test_a_crash_before_the_first_word(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    crash = "import sys, ctypes; print('about to crash', file=sys.stderr, flush=True); ctypes.string_at(0)"
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", crash))
    with pytest.raises(BuildFailed, match=r"(?s)ended with SIGSEGV.*about to crash.*had not read any node"):
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_progress_raises_ends_the_process(
    error: type[BaseException], graph: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    def interrupt(_: object) -> None:
        raise error

    with pytest.raises(error):
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS, on_progress=interrupt)
    assert started[0].returncode is not None
    assert not left_in(graph.parent)


@needs_posix
def test_a_silent_builder_can_be_stopped(
    graph: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes from it, and still somebody is asked every second whether to go on."""
    monkeypatch.setattr(process, "_COMMAND", signalled("SIGSTOP"))
    seen: list[BuildProgress] = []

    def stop_when_nothing_moves(step: BuildProgress) -> None:
        seen.append(step)
        if seen[-2:] == [step, step]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS, on_progress=stop_when_nothing_moves)
    assert started[0].returncode == -signal.SIGKILL
    assert not left_in(graph.parent)


@needs_posix
def test_the_time_limit(graph: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_COMMAND", signalled("SIGSTOP"))
    with pytest.raises(BuildFailed, match=r"(?s)longer than time_limit_s.*Raise time_limit_s"):
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS, options=BuildOptions(time_limit_s=0.5))
    assert started[0].returncode == -signal.SIGKILL
    assert not left_in(graph.parent)


@needs_posix
def test_memory_runs_out(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    """Room for the libraries and not for 64 MiB of weights: a real std::bad_alloc of the real parser."""
    large = products(graph.with_name("large.onnx"), width=2896)
    limited(monkeypatch, 320 << 10)
    with pytest.raises(BuildOutOfMemory, match=r"(?s)memory ran out.*bad_alloc.*Free some memory, or ask for less"):
        build_plan(large, graph.with_name("m.plan"), **SETTINGS)
    assert left_in(graph.parent) == ["large.onnx"]


@needs_posix
def test_no_room_for_the_plan(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    """A limit of 1 KiB or less on files stands for a full disk."""
    monkeypatch.setattr(process, "_COMMAND", ("sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *process._COMMAND))
    with pytest.raises(OSError, match="File too large") as caught:
        build_plan(graph, graph.with_name("m.plan"), **SETTINGS)
    assert caught.value.errno == errno.EFBIG
    assert not left_in(graph.parent)


def test_a_folder_that_is_not_there_is_noticed_before_the_build(
    graph: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    with pytest.raises(FileNotFoundError):
        build_plan(graph, graph.with_name("nowhere") / "m.plan", **SETTINGS)
    assert not started


def test_a_kill_by_the_kernel_is_for_lack_of_memory(graph: Path) -> None:
    """The kernel's counter cannot be moved without filling the machine: what is made of it is tested alone."""
    hearing = outcome.Hearing(None)
    for counted, error in ((True, BuildOutOfMemory), (False, BuildFailed)):
        ending = Ending(code=-9, timed_out=False, out_of_memory=counted, said=())
        request: Any = SimpleNamespace(onnx=str(graph), builder="tensorrt_rtx")
        with pytest.raises(BuildFailed) as caught:
            outcome.built(hearing, ending, request, onnx.load(graph).graph, ["8.9"])
        assert type(caught.value) is error
        assert ("the kernel killed its process" in str(caught.value)) == counted
    assert process._killed_by_kernel() >= 0


@needs_posix
@pytest.mark.parametrize("action", ["time.sleep(60)", "pass"])
def test_the_process_ends_with_the_one_that_asked(action: str, graph: Path, tmp_path: Path) -> None:
    """Which is killed in the middle of the build: the builder is silent at that time, or has something to say."""
    script = f"""
import subprocess, time
from pathlib import Path
from tnm_pipeline.export.building import process
from tnm_pipeline.export.tensorrt import build_plan

class Noted(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)

def wait(step):
    if step.done:
        print("building", flush=True)
        time.sleep(60)

subprocess.Popen = Noted
process._COMMAND = {in_the_middle(action)!r}
build_plan(Path({str(graph)!r}), Path({str(tmp_path / "m.plan")!r}), **{SETTINGS!r}, on_progress=wait)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        child = int(asking.stdout.readline())
        assert asking.stdout.readline() == "building\n"
        asking.kill()
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for init to note it does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize("builder", available_builders())
def test_nothing_of_ours_crashes_without_a_driver(builder: str, graph: Path) -> None:
    """Import, build, load: an answer or an error of ours, never a signal."""
    script = f"""
from pathlib import Path
from tnm_pipeline.engines import EnvironmentLacks, load
from tnm_pipeline.engines.driver import Driver
from tnm_pipeline.export import tensorrt
from tnm_pipeline.export.tensorrt import build_plan

import {builder}
settings = {SETTINGS!r} | {{"backend": {builder!r}}}
plan = Path({str(graph.with_name("m.plan"))!r})
try:
    build_plan(Path({str(graph)!r}), plan, **settings)
    load(plan)
except EnvironmentLacks as error:
    print("refused:", error)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # on a machine that has a driver, one without a GPU
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "needs a GPU" in done.stdout or "builds only on the GPU" in done.stdout
