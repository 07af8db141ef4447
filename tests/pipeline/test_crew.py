"""The command line under torchrun: one process leads, the others help or are refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL, Ended
from tnm_pipeline.pipeline.errors import ExitCode

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}


@pytest.mark.parametrize("command", ["run", "demo", "export"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_cannot_be_shared_is_refused_in_every_process(
    tnm: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, command: str, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = tnm(command, "--config", "small.toml") if command != "demo" else tnm(command)
    assert ended.code == ExitCode.USAGE
    assert f"{command} runs in one process, torchrun started 2: only train and convert share their work" in ended.err


@pytest.mark.slow  # four processes load torch
def test_processes_of_torchrun_train_together_and_what_they_did_is_found(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    command = ("-m", "tnm_pipeline.pipeline.cli", "train", "--config", "small.toml", "--json")
    results = []
    for launcher in (TORCHRUN, (sys.executable,)):
        ended = subprocess.run([*launcher, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        results.append(json.loads(ended.stdout))  # one process printed, once
    together, again = (result["stages"] for result in results)
    assert [stage["cached"] for stage in together.values()] == [False, False]
    assert [stage["cached"] for stage in again.values()] == [True, True]
    rows = [row for row in together["train"]["result"]["layers"] if row["pattern"]]
    assert rows
    assert all(row["violations"] == row["violations_transposed"] == 0 for row in rows)
    # 1347 samples: 21 steps an epoch, not twice as many because of the second process
    assert [step for step, _ in together["train"]["result"]["history"]["loss"]] == [21, 42]
