"""Pairs and class folders by configuration alone: trained, converted, scored by their own metric, shown as such."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import Ended
from tests.pipeline.reports import Page
from tests.training.labelled import write_encoder, write_images, write_pairs
from tnm_pipeline.pipeline.metrics import Metric, metric_of, score_of

Tnm = Callable[..., Ended]
PAIRS = """
[run]
folder = "run"
[model]
source = "hf:bert"
[data]
source = "pairs.tsv"
args = { test_where = { task = "2014*" } }
[sparsity]
keep_last = false
[train]
optimizer = "adamw"
lr = 1e-3
epochs = 1
accumulate = 2
recipe = "static"
[convert]
samples = 64
"""
IMAGES = """
[run]
folder = "run"
[model]
source = "nets:net"
[data]
source = "pictures"
args = { size = 8, resize = 8, flip = true, pad = 1 }
[train]
epochs = 1
batch_size = 8
[verify]
max_drop = 100
latency_rounds = 10
"""
NETS = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
"""


@pytest.fixture
def pairs(tnm: Tnm, tmp_path: Path) -> Tnm:
    write_encoder(tmp_path / "bert")
    write_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "pairs.toml").write_text(PAIRS, encoding="utf-8")
    return tnm


def test_pairs_are_trained_and_converted_and_scored_by_spearman(pairs: Tnm, tmp_path: Path) -> None:
    ended = pairs("train", "--config", "pairs.toml")
    assert ended.code == 0, ended.err
    results = {name: json.loads((tmp_path / "run" / name / "result.json").read_text()) for name in ("dense", "train")}
    for name, result in results.items():
        assert result["metric"] == "spearman"
        assert "accuracy" not in result
        assert f"{result['spearman']:.4f}" in ended.out
        assert list(result["history"]) == ["loss", "spearman", "flip_rate"]
        assert list((tmp_path / "run" / "tensorboard" / name).glob("events.out.tfevents.*"))
    assert "Spearman" in ended.out
    assert "%" not in ended.out
    assert "tensorboard --logdir run/tensorboard" in ended.out
    assert len([row for row in results["train"]["layers"] if row["pattern"] == "2:4-T"]) == 13
    page = Page(tmp_path / "run" / "report.html").words
    assert f"kept Spearman {results['train']['spearman']:.3f} against {results['dense']['spearman']:.3f} dense" in page
    assert "Spearman at every stage" in page
    assert "points" not in page.partition("Training curves")[0]

    dense = "run/dense/model.safetensors"
    ended = pairs("convert", dense, "--config", "pairs.toml", "--folder", "converted", "--json")
    assert ended.code == 0, ended.err
    stages = ended.json()["stages"]
    assert stages["dense"]["result"]["spearman"] == pytest.approx(results["dense"]["spearman"])
    assert 0 < stages["convert"]["result"]["spearman"] <= 1
    assert stages["convert"]["result"]["plan"]["examples"] == 64


@pytest.mark.slow
def test_processes_train_an_encoder_whose_pooler_gets_no_gradient(pairs: Tnm, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tnm_pipeline.pipeline.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "train", "--config", "pairs.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unused" not in done.stderr
    assert json.loads((tmp_path / "run" / "train" / "result.json").read_text())["spearman"] > 0


def test_what_cannot_be_done_with_pairs_is_said_before_any_work(pairs: Tnm, tmp_path: Path) -> None:
    for command in (["run"], ["export"]):
        ended = pairs(*command, "--config", "pairs.toml")
        assert ended.code == 2, ended.err
        assert "pairs.tsv holds sentence pairs, and only classifiers can be exported and verified so far" in ended.err
    assert not (tmp_path / "run" / "dense").exists()


def test_what_cannot_be_done_with_a_users_own_pairs_is_said_too(tnm: Tnm, tmp_path: Path) -> None:
    write_encoder(tmp_path / "bert")
    write_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "own_pairs.py").write_text(
        "from tnm_pipeline.training.sources import load_data\n"
        "def pairs(): return load_data('pairs.tsv', {'tokenizer': 'bert', 'test_fraction': 0.2})\n"
    )
    given = ["--set", "run.routes=['train']", "--set", "train.epochs=1", "--set", "train.lr=0.001"]
    ended = tnm("run", "--model", "hf:bert", "--data", "own_pairs:pairs", "--folder", "run", *given)
    assert ended.code == 3, ended.err
    assert "the data are scored by spearman, and only classifiers can be exported" in ended.err
    assert "Traceback" not in ended.err


def test_changed_pairs_of_the_test_file_are_scored_again(pairs: Tnm, tmp_path: Path) -> None:
    write_pairs(tmp_path / "test.tsv", [("2014", "1", "a dog", "the cat"), ("2014", "2", "a dog", "a dog")])
    given = ("--set", "data.args={ test = 'test.tsv' }", "--set", "train.epochs=1")
    first = pairs("train", "--config", "pairs.toml", "--json", *given)
    assert first.code == 0, first.err
    again = pairs("train", "--config", "pairs.toml", "--json", *given)
    assert [stage["cached"] for stage in again.json()["stages"].values()] == [True, True]
    write_pairs(tmp_path / "test.tsv", [("2014", "2", "a dog", "the cat"), ("2014", "1", "a dog", "a dog")])
    changed = pairs("train", "--config", "pairs.toml", "--json", *given)
    assert [stage["cached"] for stage in changed.json()["stages"].values()] == [False, False]
    scores = [ended.json()["stages"]["dense"]["result"]["spearman"] for ended in (first, changed)]
    assert scores[0] == -scores[1] != 0


def test_class_folders_go_all_the_way(tnm: Tnm, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures")
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    (tmp_path / "images.toml").write_text(IMAGES, encoding="utf-8")
    ended = tnm(
        "run", "--config", "images.toml", "--set", "run.routes=['train', 'convert']", "--set", "trt.enabled=false"
    )
    assert ended.code == 0, ended.err
    verified = json.loads((tmp_path / "run" / "verify" / "result.json").read_text())
    assert verified["samples"] == 16
    assert verified["accuracy"]["torch"] == verified["accuracy"]["onnx fp32"]
    converted = json.loads((tmp_path / "run" / "convert" / "result.json").read_text())
    assert converted["plan"]["examples"] == 40  # the training images alone
    assert "accuracy" in ended.out


def test_an_accuracy_is_a_percentage_and_a_correlation_is_not() -> None:
    accuracy, spearman = Metric(), Metric("spearman")
    assert (accuracy.text(0.9778), accuracy.gap(-0.0044), accuracy.title) == ("97.78%", "-0.44", "Accuracy")
    assert (spearman.text(0.75712), spearman.gap(-0.0044), spearman.title) == ("0.7571", "-0.0044", "Spearman")
    assert (accuracy.text(0.9778, 1), spearman.text(0.75712, 1)) == ("97.8%", "0.757")
    assert (accuracy.axis, spearman.axis) == ("accuracy, %", "Spearman")


def test_results_name_their_metric_and_those_without_are_accuracies() -> None:
    assert metric_of([{"files": []}, {"metric": "spearman", "spearman": 0.7}]) == Metric("spearman")
    assert metric_of([{"accuracy": 0.7}]) == Metric()
    assert score_of({"metric": "spearman", "spearman": 0.7}) == 0.7
    assert score_of({"accuracy": None}) is None
