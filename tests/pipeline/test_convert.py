"""`convert` as a user has it: without labels, its plan, how it goes on after a kill, and whose help it takes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pipeline.conftest import Ended, call, command_line
from tests.pipeline.reports import Page
from tnm_pipeline.training.checkpoint import read_checkpoint
from tnm_pipeline.training.masks.prune import prune_unstructured

Tnm = Callable[..., Ended]
MINE = """
from torch import nn

def model():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10),
    )
"""
GIVEN = ("convert", "dense.safetensors", "--model", "convertible:model", "--calibration", "x.npz", "--folder", "out")


def prepare(folder: Path) -> None:
    """A model of the user, its dense weights, and inputs without labels."""
    (folder / "convertible.py").write_text(MINE, encoding="utf-8")
    space: dict[str, Any] = {}
    exec(MINE, space)  # noqa: S102  # our own text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = space["model"]()
    save_file(model.state_dict(), folder / "dense.safetensors")
    prune_unstructured(model, ("2", "6", "8"), 0.5)
    save_file(model.state_dict(), folder / "pruned.safetensors")
    generator = np.random.default_rng(0)
    np.savez(folder / "foo.npz", foo=np.zeros((9, 1, 8, 8), np.float32), bar=np.zeros((9, 2), np.float32))
    np.savez(folder / "x.npz", x=generator.normal(size=(200, 1, 8, 8)).astype(np.float32))


@pytest.fixture
def here(tnm: Tnm, tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the plain conversion has ended; do not change it."""
    folder = tmp_path_factory.mktemp("plain")
    prepare(folder)
    ended = call(folder, *GIVEN, "--json")
    assert ended.code == 0, ended.err
    (folder / "stdout.json").write_text(ended.out, encoding="utf-8")
    return folder


def test_no_labels_are_needed(plain: Path) -> None:
    stages = json.loads((plain / "stdout.json").read_text(encoding="utf-8"))["stages"]
    assert [stages[name]["result"]["accuracy"] for name in ("dense", "convert")] == [None, None]
    result = stages["convert"]["result"]
    assert [row["name"] for row in result["layers"]] == ["2", "6", "8"]
    assert result["mean_error_own"] == pytest.approx(sum(row["error_own"] for row in result["layers"]) / 3)
    assert result["skipped"] == {
        "0": "registered first, kept dense (keep_first = true)",
        "10": "registered last, kept dense (keep_last = true)",
    }
    weight = load_file(plain / "out/convert/model.safetensors")["6.weight"]
    for matrix in (weight, weight.T):
        for row in matrix:
            for start in range(0, len(row), 4):
                assert int(row[start : start + 4].count_nonzero()) <= 2
    record = read_checkpoint(plain / "out/convert/model.safetensors").record
    assert record["layers"] == dict.fromkeys(("2", "6", "8"), "2:4-T")
    assert record["conversion"]["method"] == "admm"
    assert record["conversion"]["calibration"] == {"source": "x.npz", "args": {}, "samples": 512, "seed": 0}
    assert not (plain / "out/convert/progress").exists()
    page = Page(plain / "out/report.html")
    assert "2:4-T was not scored, because the run was given no labels; a layer's output is off by" in page.words
    assert "Accuracy: the run was given no data with labels, so nothing was scored." in page.words


def test_what_is_printed_without_labels(plain: Path) -> None:
    ended = call(plain, *GIVEN)  # cached
    assert ended.code == 0, ended.err
    result = json.loads((plain / "out/convert/result.json").read_text(encoding="utf-8"))
    assert f"{result['mean_error']:.3f} (own {result['mean_error_own']:.3f})" in ended.out
    assert ended.out.count("no labels") == 2
    assert "next: tnm-pipeline export --trt --folder out" in ended.out


def test_the_number_of_workers_changes_nothing(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    cached = call(tmp_path / "copy", *GIVEN, "--set", "convert.workers=3", "--json").json()
    assert cached["stages"]["convert"]["cached"]
    assert call(tmp_path / "copy", *GIVEN, "--set", "convert.workers=3", "--folder", "anew").code == 0
    assert same(tmp_path / "copy/anew", plain / "out")


def same(one: Path, other: Path) -> bool:
    names = ("convert/model.safetensors", "convert/result.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tnm: Tnm, here: Path) -> None:
    before = sorted(here.rglob("*"))
    shown = tnm(*GIVEN, "--dry-run")
    assert shown.code == 0, shown.err
    assert "3 layers (first pattern that fits): 3 2:4-T; 2 skipped" in shown.out
    assert "registered first, kept dense (keep_first = true)" in shown.out
    assert "method admm, 200 calibration examples in 4 batches" in shown.out
    assert "tensors beyond the model and the data, about" in shown.out
    plan = tnm(*GIVEN, "--dry-run", "--json").json()
    assert [layer["pattern"] for layer in plan["layers"]] == ["2:4-T"] * 3
    assert plan["memory"]["total"] == sum(plan["memory"][part] for part in ("activations", "copies", "sums"))
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_plan_of_a_budget_is_shown_kept_and_compared_with_what_was_reached(tnm: Tnm, here: Path) -> None:
    chosen = ("--set", "convert.choose=budget", "--set", "convert.max_dense=0.4", "--set", "convert.patterns=['2:4']")
    plan = tnm(*GIVEN, *chosen, "--dry-run", "--json").json()
    assert "dense" in {layer["pattern"] for layer in plan["layers"]}
    ended = tnm(*GIVEN, *chosen, "--json")
    assert ended.code == 0, ended.err
    assert "least effect, max_dense = 0.4" in ended.err
    result = ended.json()["stages"]["convert"]["result"]
    assert plan.pop("memory")["total"] > 0  # of this machine's workers, so no part of the result
    assert result["plan"] == plan
    left = {layer["name"]: layer["reason"] for layer in plan["layers"] if layer["pattern"] == "dense"}
    assert left.items() <= result["skipped"].items()
    assert all(len(row["pattern"]) == 3 for row in result["layers"])
    words = Page(here / "out/report.html").words
    taken = next(layer for layer in plan["layers"] if layer["pattern"] == "2:4")
    candidate = next(one for one in taken["candidates"] if one["rejected"] is None)
    assert f"{candidate['predicted_error']:.1%}" in words
    assert all(f"{row['error_own']:.1%}" in words for row in result["layers"])


def test_a_plan_that_leaves_all_dense_is_refused(tnm: Tnm, here: Path) -> None:
    ended = tnm(*GIVEN, "--set", "convert.choose=zeros")
    assert ended.code == 3, ended.err
    assert "leaves all 3 layers dense (zeros at confidence 0.95)" in ended.err
    assert tnm(*GIVEN, "--set", "convert.choose=zeros", "--dry-run").code == 0


def test_a_reference_is_what_is_fitted_to(tnm: Tnm, here: Path) -> None:
    pruned = ("convert", "pruned.safetensors", *GIVEN[2:])
    alone = tnm(*pruned, "--json").json()["stages"]["convert"]["result"]
    ended = tnm(*pruned, "--set", "convert.reference=dense.safetensors", "--json")
    assert ended.code == 0, ended.err
    assert ended.json()["stages"]["convert"]["result"]["mean_error"] > alone["mean_error"]  # of the dense outputs
    ended = tnm(*pruned, "--set", "convert.reference=absent.safetensors")
    assert ended.code == 3
    assert "absent.safetensors does not exist" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--calibration", "absent.npz"), 3, "data file absent.npz does not exist"),
        (("--calibration", "nothing"), 3, "unknown calibration source 'nothing'"),
        (("--calibration", "pairs.tsv"), 3, "so name the others: --set calibration.args='{ test_fraction = 0.1 }'"),
        (("--calibration", "foo.npz"), 3, "foo.npz holds foo, bar, and Sequential.forward takes input: give"),
        (("--set", "convert.method=sparsegpt"), 2, "method sparsegpt cannot follow 2:4-T"),
        (("--set", "sparsity.exclude=['type:Bilinear']"), 3, "type:Bilinear"),
        (("--set", "sparsity.exclude=['re:(']"), 3, "cannot read the rule"),
        (
            ("--set", "convert.choose=budget", "--set", "convert.work=0.1"),
            2,
            "the sparsest patterns leave 50.0% of the work",
        ),
        (("--set", "calibration.args={x = 1}"), 3, "takes no arguments"),
    ],
)
def test_mistakes(tnm: Tnm, here: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    for more in ((), ("--dry-run",)):
        ended = tnm(*GIVEN, *arguments, *more)
        assert ended.code == code, ended.err
        assert said in ended.err
    assert not (here / "out/convert/model.safetensors").exists()


def test_neither_labels_nor_calibration(tnm: Tnm, here: Path) -> None:
    ended = tnm("convert", "dense.safetensors", "--model", "convertible:model")
    assert ended.code == 2
    assert "or --calibration with unlabelled inputs" in ended.err
    assert not (here / "runs").exists()


def test_inputs_that_the_model_does_not_take(tnm: Tnm, here: Path) -> None:
    np.savez(here / "x.npz", x=np.ones((10, 3, 8, 8), np.float32))
    ended = tnm(*GIVEN)
    assert ended.code == 3, ended.err
    assert "the model fails on the calibration data: RuntimeError" in ended.err


SLOW = ("--set", "convert.method=adaprune", "--set", "convert.workers=1")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_conversion_goes_on_layer_by_layer(tmp_path: Path, how: signal.Signals) -> None:
    prepare(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command_line(*GIVEN, *SLOW)
    journal = tmp_path / "out/convert/progress"
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not list(journal.glob("*-*.safetensors")):
            time.sleep(0.002)
        process.send_signal(how)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    finished = {path.name: path.read_bytes() for path in journal.glob("*-*.safetensors")}
    assert finished
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "of 3; the same command goes on from there" in said
    resumed = call(tmp_path, *GIVEN, *SLOW)
    assert resumed.code == 0, resumed.err
    assert not journal.exists()
    assert call(tmp_path, *GIVEN, *SLOW, "--folder", "whole").code == 0
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow  # four processes load torch
def test_processes_of_torchrun_make_the_same_file(plain: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    ended = subprocess.run(
        [*torchrun, "tnm_pipeline.pipeline.cli", *GIVEN],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report: ") == 1
    assert same(tmp_path / "out", plain / "out")
    again = subprocess.run([*torchrun, "tnm_pipeline.pipeline.cli", *GIVEN], cwd=tmp_path, capture_output=True)
    assert again.returncode == 0  # cached: nothing to help with


@pytest.mark.slow  # loads transformers
def test_a_model_of_hugging_face_and_a_text_file(tnm: Tnm, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from tests.training.zoo import SENTENCES, small_bert

    words = sorted({word.strip(".,?").lower() for sentence in SENTENCES for word in sentence.split()})[:95]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(vocab_file=str(bert / "vocab.txt"), model_max_length=16).save_pretrained(bert)
    model: Any = small_bert()
    model.save_pretrained(bert)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    text = ("--calibration", "text.txt", "--set", "calibration.args={max_length = 16}")
    ended = tnm("convert", "bert/model.safetensors", "--model", "hf:bert", *text, "--folder", "out", "--json")
    assert ended.code == 0, ended.err
    result = ended.json()["stages"]["convert"]["result"]
    assert len(result["layers"]) == 12
    ended = tnm("inspect", "out/convert/model.safetensors", "--json")
    assert ended.code == 0
    # what is remembered is no code, so nothing needs to be trusted
    again = tnm("convert", "out/convert/model.safetensors", *text, "--folder", "two", "--dry-run")
    assert again.code == 0, again.err
