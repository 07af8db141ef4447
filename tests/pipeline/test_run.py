"""A whole run: what it leaves, what it caches, and what a kill does to it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.pipeline.conftest import SMALL, Ended, call, command_line
from tnm_pipeline.engines.artifact import read_manifest, sha256_of


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finals(folder: Path) -> dict[str, str]:
    names = ("train/model.safetensors", "convert/model.safetensors", "export/model.fp32.onnx", "export/model.fp16.onnx")
    return {name: digest(folder / "run" / name) for name in names}


def test_every_stage_left_a_result(small_run: Path) -> None:
    stages = json.loads((small_run / "stdout.json").read_text(encoding="utf-8"))["stages"]
    order = ["dense", "train", "convert", "prune", "convert-unstructured", "best", "export", "build", "verify"]
    assert list(stages) == order
    assert not any(stage["cached"] for stage in stages.values())
    assert stages["verify"]["result"]["parity"]["fp32"]["max_abs"] <= 1e-5
    assert stages["verify"]["result"]["parity"]["fp16"]["relative_to_absmax"] <= 1.5e-3
    assert (small_run / "run" / "report.html").stat().st_size > 100_000
    assert not list((small_run / "run").rglob("*.tmp"))


def test_the_exported_weights_hold_the_pattern_both_ways(small_run: Path) -> None:
    """Counted here in plain loops, so that no line is shared with what made or checked them."""
    record = json.loads((small_run / "run/export/model.fp32.onnx.manifest.json").read_text(encoding="utf-8"))
    patterns = record["sparsity"]["patterns"]
    assert len(patterns) == 3
    graph = onnx.load(small_run / "run/export/model.fp32.onnx").graph
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for layer, pattern in patterns.items():
        assert pattern == "2:4-T"
        weight = weights[f"{layer}.weight"]
        kernels = weight.reshape(*weight.shape[:2], -1)
        for position in range(kernels.shape[2]):
            matrix = kernels[:, :, position]
            for one in (matrix, matrix.T):
                for row in one:
                    for start in range(0, len(row), 4):
                        assert np.count_nonzero(row[start : start + 4]) <= 2


def test_manifests_say_where_artifacts_come_from_and_what_became_of_their_layers(small_run: Path) -> None:
    folder = small_run / "run"
    source = read_manifest(folder / "export/model.fp16.onnx")
    assert source.provenance["checkpoint_sha256"] == sha256_of(folder / "best/model.safetensors")
    packages = source.provenance["packages"]
    assert isinstance(packages, dict)
    assert packages["torch"] == metadata.version("torch")
    for name, flag, reason in (("model.fp16.plan", True, "rtx-silent"), ("model.fp16.dense.plan", False, "flag-off")):
        plan = read_manifest(folder / "build" / name)
        assert plan.provenance["source"] == source.provenance
        assert plan.sparse_weights_flag is flag
        verdict = plan.sparsity["verdict"]
        assert isinstance(verdict, dict)
        layers = verdict["layers"]
        promised = {layer["layer"]: layer["pattern"] for layer in layers if layer["pattern"]}
        assert promised == source.sparsity["patterns"]
        assert any(layer["eligible"] and layer["why"] == [reason] for layer in layers)
    assert read_manifest(folder / "build/engine.plan").sparsity["verdict"]


def test_the_second_run_does_nothing_again(small_run: Path) -> None:
    ended = call(small_run, "run", "--config", "small.toml", "--json")
    assert ended.code == 0, ended.err
    assert all(stage["cached"] for stage in ended.json()["stages"].values())


def test_a_changed_setting_repeats_what_depends_on_it(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "copy")
    changed = ("--set", "convert.method=magnitude", "--set", "trt.enabled=false")
    ended = call(tmp_path / "copy", "run", "--config", "small.toml", "--json", *changed)
    assert ended.code == 0, ended.err
    cached = {name for name, stage in ended.json()["stages"].items() if stage["cached"]}
    assert {"dense", "train"} <= cached
    assert not {"convert", "convert-unstructured", "best"} & cached


def test_a_damaged_output_is_made_again(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "copy")
    victim = tmp_path / "copy/run/export/model.fp32.onnx"
    before = digest(victim)
    victim.write_bytes(victim.read_bytes()[:-1])
    ended = call(tmp_path / "copy", "run", "--config", "small.toml", "--json")
    assert ended.code == 0, ended.err
    assert not ended.json()["stages"]["export"]["cached"]
    assert digest(victim) == before


@pytest.mark.parametrize(
    "moment",
    [
        "train/state.safetensors",
        pytest.param("dense/state.safetensors", marks=pytest.mark.slow),
        pytest.param("convert/model.safetensors", marks=pytest.mark.slow),
        pytest.param("export/model.fp32.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_kill_changes_nothing_in_the_end(small_run: Path, tmp_path: Path, moment: str) -> None:
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    arguments = ("run", "--config", "small.toml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command_line(*arguments), cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (tmp_path / "run" / moment).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    ended = call(tmp_path, *arguments)
    assert ended.code == 0, ended.err
    assert finals(tmp_path) == finals(small_run)


def test_interrupting_stops_cleanly_and_goes_on(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    arguments = ("run", "--config", "small.toml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command_line(*arguments), cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (tmp_path / "run/dense/state.safetensors").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == 130
    assert "Traceback" not in said
    ended = call(tmp_path, *arguments)
    assert ended.code == 0, ended.err
    assert finals(tmp_path) == finals(small_run)


def test_two_runs_in_one_folder(tnm: Callable[..., Ended], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    (tmp_path / "run/.owner").write_text("process 12345 on somewhere", encoding="utf-8")
    with FileLock(tmp_path / "run/.lock"):
        ended = tnm("run", "--config", "small.toml")
    assert ended.code == 8
    assert "12345" in ended.err
