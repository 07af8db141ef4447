"""The command line as a user has it, and one small run of everything."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.reports import ALL, RUN, config_text
from tnm_pipeline.pipeline.cli import main

SMALL = """
[run]
folder = "run"
[model]
source = "digits-cnn"
args = { channels = 4 }
[data]
source = "digits"
[train]
epochs = 2
save_every = 5
[convert]
samples = 128
[verify]
max_drop = 100
latency_rounds = 10
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from tnm_pipeline.pipeline.cli import main; main()", *arguments]


def call(folder: Path, *arguments: str) -> Ended:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line(*arguments), cwd=folder, env=environment, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def tnm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command line in this process, which is quicker, in an empty folder that holds small.toml."""
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call_here(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tnm-pipeline", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return call_here


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `tnm-pipeline run --config small.toml` has ended; do not change it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.toml").write_text(SMALL, encoding="utf-8")
    ended = call(folder, "run", "--config", "small.toml", "--json")
    assert ended.code == 0, ended.err
    (folder / "stdout.json").write_text(ended.out, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with every stage's result and no cache records."""
    target = tmp_path / "run"
    for stage in ALL:
        target.joinpath(stage).mkdir(parents=True)
        shutil.copyfile(RUN / f"{stage}.json", target / stage / "result.json")
    target.joinpath("config.toml").write_text(config_text(target), encoding="utf-8")
    return target
