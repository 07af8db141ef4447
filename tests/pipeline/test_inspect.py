"""What `inspect` and `verify` say of a file that is not what they hoped for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import NodeProto, numpy_helper
from onnx.helper import make_node
from rich.console import Console
from safetensors.torch import save_file

from tests.export.graphs import tensor, write
from tnm_pipeline.engines import ArtifactRejected, RunFailed
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, write_manifest
from tnm_pipeline.engines.driver import Driver, Gpu
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.pipeline import inspect
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.inspect import Facts, Row, inspect_file, verify_file
from tnm_pipeline.pipeline.rivals import Rival
from tnm_pipeline.pipeline.what_if import what_if_file
from tnm_pipeline.training.checkpoint import CheckpointError


def test_a_plan_without_its_manifest(small_run: Path, tmp_path: Path) -> None:
    plan = Path(shutil.copy(small_run / "run/build/model.fp16.plan", tmp_path))
    with pytest.raises(ArtifactRejected, match=r"model\.fp16\.plan\.manifest\.json is missing"):
        inspect_file(plan, None)
    with pytest.raises(ArtifactRejected, match=r"model\.fp16\.plan\.manifest\.json is missing"):
        verify_file(plan, "onnxruntime")


def test_a_plan_says_in_words_what_its_source_holds_and_how_to_check_it(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_run / "run/build/model.fp16.plan"
    for gpus, option in (((), " --fallback onnxruntime"), ((Gpu("NVIDIA A100", "8.0"),), "")):
        monkeypatch.setattr(inspect, "probe", lambda gpus=gpus: Driver("13.0", gpus, None))
        lines = inspect_file(plan, None).lines
        assert "sparsity of its source: 3 of 5 layers eligible, 3 promise 2:4-T" in lines
        assert f"check it with: tnm-pipeline verify {plan}{option}" in lines


def test_a_manifest_is_not_the_artifact(small_run: Path) -> None:
    path = small_run / "run/export/model.fp32.onnx.manifest.json"
    said = r"is a manifest: give the artifact that it describes, .*/model\.fp32\.onnx$"
    for look in (lambda: inspect_file(path, None), lambda: verify_file(path, "error"), lambda: Rival(path, None)):
        with pytest.raises(ArtifactRejected, match=said):
            look()


def test_a_plan_cannot_be_counted(small_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pattern 4:8: the weights .* cannot be counted; .*model\.fp16\.onnx"):
        inspect_file(small_run / "run/build/engine.plan", "4:8")


def test_a_checkpoint_is_inspected_and_not_verified(small_run: Path) -> None:
    path = small_run / "run/train/model.safetensors"
    for look in (lambda: verify_file(path, "error"), lambda: Rival(path, None)):
        with pytest.raises(ArtifactRejected, match="is a checkpoint: `tnm-pipeline inspect"):
            look()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRejected, match="is no file"):
        inspect_file(tmp_path, None)


def test_a_whole_model_names_the_class_that_it_would_run(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(4, 4), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"\(torch\.nn\.modules\.linear\.Linear\) and was not opened"):
        inspect_file(tmp_path / "whole.pt", None)


def test_arrays_are_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    for look in (lambda path: inspect_file(path, None), lambda path: what_if_file(path, "2:4")):
        with pytest.raises(CheckpointError, match=r"data\.npz is an \.npz of arrays, not a checkpoint"):
            look(tmp_path / "data.npz")


@pytest.mark.parametrize("narrow", [False, True])
def test_names_are_never_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    """In a log a layer has one line; in a narrow window its name goes on in the next one."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"bert.encoder.layer.{number}.attention.self.query.dense.inner" for number in range(12)]
    save_file({f"{name}.weight": torch.ones(8, 8) for name in names}, path := tmp_path / "long.safetensors")
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: narrow))
    for facts in (inspect_file(path, None), what_if_file(path, "2:4")):
        facts.show()
        lines = capsys.readouterr().out.splitlines()
        shown = "".join(line.split("│")[1].strip() if "│" in line else " " for line in lines)
        for name in names:
            assert name in shown
            assert narrow or any(f" {name} " in line for line in lines)


def test_anybodys_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in the order of the graph, totals, and what could not be counted; no manifest is needed."""
    sparse = np.tile(np.array([1, 0, 0, 1], np.float32), (8, 2)).T.copy()  # (K, O): 2:4 along K
    weights = [
        numpy_helper.from_array(array, name) for array, name in ((np.ones((8, 8), np.float32), "z"), (sparse, "a"))
    ]
    nodes = [
        make_node("MatMul", ["x", "z"], ["h"], "first"),
        make_node("MatMul", ["h", "a"], ["i"], "second"),
        make_node("Mul", ["a", "z"], ["made"], "scaling"),
        make_node("MatMul", ["i", "made"], ["y"], "third"),
    ]
    path = write(tmp_path / "m.onnx", nodes, [tensor("x", "n", 8)], [tensor("y", "n", 8)], weights=weights)
    facts = inspect_file(path, None)
    assert [(row.layer, row.op, row.node, row.note, row.key) for row in facts.rows] == [
        ("z", "MatMul", "first", "100.0% of its weights are not zero, so nothing was pruned", "not-pruned"),
        ("a", "MatMul", "second", "eligible", ""),
    ]
    assert facts.totals == {
        "layers": 2,
        "weights": 128,
        "eligible": 1,
        "eligible_weights": 64,
        "violations": 16,
        "violations_transposed": 16 + 8,  # four inputs are used by all eight outputs: two groups each
        "unread": 1,
    }
    told = json.loads(json.dumps(facts.to_dict()))
    assert told["totals"] == facts.totals
    assert (told["unread"][0]["node"], told["unread"][0]["key"]) == ("third", "computed-weight")
    assert "train or convert it" in told["rows"][0]["remedy"]
    facts.show()
    said = capsys.readouterr().out
    assert "eligible for 2:4: 1 layers with 50.0% of the weights" in said
    assert "so nothing was pruned [not-pruned]" in " ".join(said.split())
    assert "not counted: third (MatMul): it comes out of Mul node 'scaling'" in said


def test_zeros_along_the_wrong_axis_and_of_another_pattern_are_told_apart(tmp_path: Path) -> None:
    along = np.tile(np.array([1, 0, 0, 1], np.float32), (8, 2))  # (K, O)
    coarse = np.tile(np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32)[:, None], (1, 8))
    weights = [numpy_helper.from_array(along, "along"), numpy_helper.from_array(coarse, "coarse")]
    nodes = [make_node("MatMul", ["x", "along"], ["h"], "one"), make_node("MatMul", ["h", "coarse"], ["y"], "two")]
    path = write(tmp_path / "m.onnx", nodes, [tensor("x", "n", 8)], [tensor("y", "n", 8)], weights=weights)
    assert [row.key for row in inspect_file(path, None).rows] == ["wrong-axis", "other-pattern"]


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are markup to the printer, and `:smile:` an emoji, unless it is told."""
    monkeypatch.setenv("COLUMNS", "120")
    Facts("runs/[bold]x", [Row("[red]a:smile:", (4, 4), "2:4", 0.5, 0, 0, "[dim]")], ["[i]line"]).show()
    said = capsys.readouterr().out
    assert all(part in said for part in ("runs/[bold]x", "[red]a:smile:", "[dim]", "[i]line"))


def published(path: Path, nodes: list[NodeProto], shape: list[int | str], **promised: str) -> Path:
    """A network as `export` would publish it, with a manifest."""
    weights = [numpy_helper.from_array(np.ones((2, 3, 5, 5), np.float32), "w")]
    write(path, nodes, [tensor("x", *shape)], [tensor("y", "batch", 2, "h", "w_")], weights=weights)
    summary = {**inspect_onnx(path).summary(), "patterns": promised}
    write_manifest(path, onnx_manifest(path, precision="fp32", sparsity=summary))
    return path


def test_sizes_that_the_network_takes_are_found(tmp_path: Path) -> None:
    """A kernel of 5 x 5 on an image of 1 x 1 gives nothing."""
    nodes = [make_node("Conv", ["x", "w"], ["y"])]
    path = published(tmp_path / "m.onnx", nodes, ["batch", 3, "height", "width"])
    facts = verify_file(path, "error")
    assert any("loaded and run by onnxruntime" in line for line in facts.lines)


def test_sizes_that_were_tried_are_named(tmp_path: Path) -> None:
    nodes = [make_node("Conv", ["x", "w"], ["y"], dilations=[100, 100])]
    path = published(tmp_path / "m.onnx", nodes, ["batch", 3, "height", "width"])
    with pytest.raises(RunFailed, match=r"height, width was each of 1, 8, 32, 64, 224: run it with"):
        verify_file(path, "error")


def test_a_promise_that_no_node_keeps(tmp_path: Path) -> None:
    path = published(tmp_path / "m.onnx", [make_node("Conv", ["x", "w"], ["y"])], ["batch", 3, 8, 8], gone="2:4")
    with pytest.raises(ArtifactRejected, match=r"m\.onnx lacks layers that its manifest promises: gone"):
        verify_file(path, "error")


def test_the_source_of_a_plan_is_known_by_its_hash(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "run", tmp_path / "run")
    plan, source = tmp_path / "run/build/model.fp16.plan", tmp_path / "run/export/model.fp16.onnx"
    assert verify_file(plan, "onnxruntime").rows
    stated = read_manifest(source)
    manifest_path(source).unlink()
    with pytest.raises(ArtifactRejected, match=r"model\.fp16\.onnx\.manifest\.json is missing"):
        verify_file(plan, "onnxruntime")
    shutil.copyfile(tmp_path / "run/export/model.fp32.onnx", source)
    with pytest.raises(ArtifactRejected, match=rf"model\.fp16\.plan was built from {stated.sha256}"):
        verify_file(plan, "onnxruntime")
    source.unlink()
    with pytest.raises(ArtifactRejected, match=r"is missing, from which model\.fp16\.plan was built"):
        verify_file(plan, "onnxruntime")
