"""Pairs and class folders by configuration alone: trained, converted, scored by their own metric, shown as such."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.pipeline.conftest import Ended
from tests.pipeline.reports import Page
from tests.training.labelled import pair_rows, write_encoder, write_images, write_pairs
from tnm_pipeline.engines.artifact import read_manifest
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
backend = "auto"
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
    # Pairs of equal sentences have a cosine of 1 but for rounding, which would rank them by chance.
    write_pairs(tmp_path / "pairs.tsv", [row for row in pair_rows() if row[2] != row[3]])
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
    assert {row["layer"] for row in results["train"]["packs"]} == {row["name"] for row in results["train"]["layers"]}
    assert "packs" not in results["dense"]
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


def test_dense_baseline_teaches_what_was_converted_from_it(pairs: Tnm, tmp_path: Path) -> None:
    """One command, three stages; the teacher is not the converted network that training begins with."""
    shutil.rmtree(tmp_path / "bert")
    write_encoder(tmp_path / "bert", spread=0.3)
    keys = ("train.start=converted", "train.teacher=1", "train.lr=1e-9", "train.epochs=1", "run.seed=1")
    given = [part for key in keys for part in ("--set", key)]
    ended = pairs("train", "--config", "pairs.toml", "--json", *given)
    assert ended.code == 0, ended.err
    stages = ended.json()["stages"]
    assert list(stages) == ["dense", "convert", "train"]
    converted, trained, dense = (
        load_file(tmp_path / "run" / name / "model.safetensors") for name in ("convert", "train", "dense")
    )
    weights = [name for name in dense if dense[name].dim() == 2 and "encoder" in name]
    for name in weights:  # at a rate of nearly nothing
        assert abs(trained[name] - converted[name]).max() < 1e-6
        assert abs(trained[name] - dense[name]).max() > 1e-3
    (_, distance), *_ = stages["train"]["result"]["history"]["loss"]
    assert 1e-4 < distance < 0.5
    again = pairs("train", "--config", "pairs.toml", "--json", *given)
    assert all(stage["cached"] for stage in again.json()["stages"].values())


@pytest.mark.slow
def test_processes_train_an_encoder_whose_pooler_gets_no_gradient(pairs: Tnm, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tnm_pipeline.pipeline.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    taught = ["--set", "train.teacher=0.5", "--set", "train.start=converted"]
    command = [sys.executable, *torchrun, "train", "--config", "pairs.toml", *taught]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unused" not in done.stderr
    assert json.loads((tmp_path / "run" / "train" / "result.json").read_text())["spearman"] > 0


def test_pairs_go_all_the_way(pairs: Tnm, tmp_path: Path) -> None:
    """Two inputs of one varying length, two outputs, scored by Spearman; plans with a profile for each use."""
    profiles = "[{ batch = [1, 1, 1], sequence = [1, 8, 16] }, { batch = [1, 8, 64] }]"
    chosen = ("run.routes=['train']", "verify.max_drop=100", "verify.latency_rounds=10", f"trt.profiles={profiles}")
    precisions = "export.precisions=['fp32', 'fp16', 'bf16']"
    ended = pairs("run", "--config", "pairs.toml", *(part for key in (*chosen, precisions) for part in ("--set", key)))
    assert ended.code == 0, ended.err
    results = {
        name: json.loads((tmp_path / "run" / name / "result.json").read_text()) for name in ("best", "export", "verify")
    }
    assert results["verify"]["metric"] == "spearman"
    assert results["verify"]["scores"]["torch"] == pytest.approx(results["best"]["spearman"], abs=1e-6)
    assert results["verify"]["scores"]["onnx fp32"] == pytest.approx(results["best"]["spearman"], abs=1e-6)
    assert results["verify"]["parity"].keys() == {"fp32", "fp16", "bf16"}
    low, usual, high = results["export"]["ranges"]["sequence"]
    assert (low, high) == (
        15,
        23,
    )  # all these sentences are padded to 15 tokens, which is not taken for their only length
    plan = read_manifest(tmp_path / "run" / "build" / "model.fp16.plan")
    assert [spec.name for spec in plan.inputs] == ["input_ids", "token_type_ids", "attention_mask"]
    assert [dict(profile) for profile in plan.profiles] == [
        {"batch": (1, 1, 1), "sequence": (1, 8, 16)},
        {"batch": (1, 8, 64), "sequence": (1, usual, high)},
    ]
    page = Page(tmp_path / "run" / "report.html").words
    assert "ONNX bf16" in page


@pytest.mark.slow
def test_a_users_own_pairs_go_all_the_way_too(tnm: Tnm, tmp_path: Path) -> None:
    write_encoder(tmp_path / "bert")
    write_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "own_pairs.py").write_text(
        "from tnm_pipeline.training.sources import load_data\n"
        "def pairs(): return load_data('pairs.tsv', {'tokenizer': 'bert', 'test_fraction': 0.2})\n"
    )
    keys = ["run.routes=['train']", "train.epochs=1", "train.lr=0.001", "trt.enabled=false", "verify.max_drop=100"]
    given = [part for key in (*keys, "verify.latency_rounds=10") for part in ("--set", key)]
    ended = tnm("run", "--model", "hf:bert", "--data", "own_pairs:pairs", "--folder", "run", *given)
    assert ended.code == 0, ended.err
    assert "Spearman" in ended.out


def test_an_encoder_is_exported_without_labels(pairs: Tnm, tmp_path: Path) -> None:
    """Sentences alone: parity is measured on them, no score is claimed, and no plan is built unless asked for."""
    (tmp_path / "sentences.txt").write_text("a dog\nthe red dog ran\na cat and a dog\nthe cat\n" * 4, encoding="utf-8")
    made = pairs("train", "--config", "pairs.toml")
    assert made.code == 0, made.err
    weights = load_file(tmp_path / "run/train/model.safetensors")
    foreign = {name: tensor for name, tensor in weights.items() if not name.startswith("mask/")}
    save_file(foreign, tmp_path / "foreign.safetensors")
    given = ("--calibration", "sentences.txt", "--model", "hf:bert", "--folder", "exported", "--json")
    ended = pairs("export", "foreign.safetensors", *given)
    assert ended.code == 0, ended.err
    verified = ended.json()["stages"]["verify"]["result"]
    assert verified["scores"] == {}
    assert verified["samples"] == 16
    assert verified["parity"]["fp32"]["max_abs"] <= 1e-5


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
    assert verified["scores"]["torch"] == verified["scores"]["onnx fp32"]
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
