"""What `bench` times, and what it says where it cannot."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.pipeline.conftest import Ended
from tnm_pipeline.engines.artifact import read_manifest, write_manifest
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.pipeline.foreign import ForeignSession, inputs_of, made_up
from tnm_pipeline.pipeline.rivals import Rival, caveats, names_of, twin_of
from tnm_pipeline.pipeline.turns import sessions_for

Tnm = Callable[..., Ended]


def write(
    path: Path, batch: int | str = "batch", *, half: bool = False, scale: float = 1.0, kept: int = 4, hidden: int = 8
) -> Path:
    """Tokens -> embeddings + features -> a product, as another tool might write it: no manifest, a weight as input."""
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weight = np.full((16, hidden), scale) * (np.arange(16) % 4 < kept)[:, None]
    arrays: dict[str, NDArray[Any]] = {"table": np.eye(5, 16), "weight": weight}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "tokens"], ["embedded"], "embed"),
            helper.make_node("Add", ["embedded", "features"], ["hidden"], "add"),
            helper.make_node("MatMul", ["hidden", "weight"], ["output"], "product"),
        ],
        "graph",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, [batch, "sequence"]),
            helper.make_tensor_value_info("features", dtype, [batch, "sequence", 16]),
            helper.make_tensor_value_info("weight", dtype, [16, hidden]),
        ],
        [helper.make_tensor_value_info("output", dtype, [batch, "sequence", hidden])],
        [numpy_helper.from_array(array.astype(np.float16 if half else np.float32), n) for n, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def timed(tnm: Tnm, *arguments: str) -> Any:
    ended = tnm("bench", *arguments, "--rounds", "10", "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_foreign_twins_are_swept_with_a_control(tnm: Tnm, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", kept=2)
    write(tmp_path / "dense.onnx", scale=2.0)
    found = timed(tnm, "model.onnx", "--batches", "1, 3", "--size", "sequence=7")
    assert found["against"] == "dense.onnx"
    assert found["sizes"] == {"sequence": 7}
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert [line["name"] for line in row["rows"]] == ["sparse", "dense", "dense again"]
        assert (row["baseline"], row["control"], row["samples"]) == ("dense", "dense again", row["batch"])
        assert row["claim"]["key"] in ("faster", "no-difference", "dense-faster", "spread-too-wide")
        sparse = row["rows"][0]
        assert sparse["samples_per_s"] == pytest.approx(row["batch"] * 1e6 / sparse["median_us"])
    assert any("lies beside it" in note for note in found["notes"])
    assert any("multiplies by the zeros" in note for note in found["notes"])
    assert found["environment"]["cores"] >= 1
    assert found["sessions"] == 3
    assert not any("differ in more" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("one", "other", "unfair"),
    [
        ({}, {"scale": 2.0}, None),
        ({"kept": 2}, {"kept": 2, "scale": 2.0}, None),
        ({"hidden": 64}, {"hidden": 32}, "the shapes of their weights"),
    ],
)
def test_what_is_not_known_to_be_sparse_is_called_by_its_name(
    tnm: Tnm, tmp_path: Path, one: dict[str, Any], other: dict[str, Any], unfair: str | None
) -> None:
    write(tmp_path / "one.onnx", **one)
    write(tmp_path / "other.onnx", **other)
    found = timed(tnm, "one.onnx", "--against", "other.onnx", "--size", "sequence=2", "--batches", "2")
    assert [line["name"] for line in found["rows"][0]["rows"]] == ["one.onnx", "other.onnx", "other.onnx again"]
    sentence = found["rows"][0]["claim"]["sentence"]
    assert "sparse" not in sentence
    assert "dense" not in sentence
    said = [note for note in found["notes"] if "differ in more" in note]
    assert [unfair in note for note in said if unfair] == [True] * bool(unfair)
    assert bool(said) == bool(unfair)


def test_a_deployed_plan_that_is_the_dense_one_is_not_called_sparse(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "run/build", tmp_path / "build")
    sparse, dense = (Rival(tmp_path / f"build/model.fp16{name}.plan", None) for name in ("", ".dense"))
    assert names_of(sparse, dense) == ("sparse", "dense")
    assert not any("differ in more" in note for note in caveats(sparse, dense))
    shutil.copyfile(dense.path, tmp_path / "build/engine.plan")
    write_manifest(tmp_path / "build/engine.plan", replace(read_manifest(dense.path), artifact="engine.plan"))
    engine = Rival(tmp_path / "build/engine.plan", None)
    assert names_of(engine, dense) == ("engine.plan", "model.fp16.dense.plan")
    assert "same byte for byte" in next(caveats(engine, dense))


def test_one_session_of_large_files(tmp_path: Path) -> None:
    small, large = write(tmp_path / "small.onnx"), write(tmp_path / "large.onnx")
    model = onnx.load(large)
    onnx.save(model, large, save_as_external_data=True, location="large.data", size_threshold=0)
    assert sessions_for([small, large]) == 3
    with (tmp_path / "large.data").open("r+b") as file:
        file.truncate((1 << 28) + 1)  # with holes: it takes no room
    assert sessions_for([small, large]) == 1


def test_the_table_names_every_claim(tnm: Tnm, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx")
    shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
    ended = tnm("bench", "model.onnx", "--against", "other.onnx", "--size", "sequence=2", "--rounds", "10")
    assert ended.code == 0, ended.err
    for part in ("other.onnx again", "samples/s", "batch 64: ", "same byte for byte"):
        assert part in ended.out


def test_an_fp16_file_alone_of_one_batch_size(tnm: Tnm, tmp_path: Path) -> None:
    write(tmp_path / "alone.onnx", 2, half=True)
    found = timed(tnm, "alone.onnx", "--size", "sequence=3")
    (row,) = found["rows"]
    assert (row["batch"], row["claim"]) == (2, None)
    assert [line["name"] for line in row["rows"]] == ["artifact", "artifact again"]
    assert "the file was made for batches of 2 and no others" in found["notes"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("absent.onnx",), 3, "is no file"),
        (("model.onnx",), 2, "leaves sequence open: say how large, by --size sequence=N"),
        (("model.onnx", "--size", "sequence=x"), 2, "write NAME=N"),
        (
            ("model.onnx", "--size", "sequence=4", "--size", "width=4"),
            2,
            "has no dimension width: it has batch, sequence",
        ),
        (("model.onnx", "--size", "batch=4"), 2, "give its sizes by --batches"),
        (("model.onnx", "--size", "sequence=4", "--batches", "0,4"), 2, "whole numbers"),
        (("model.onnx", "--size", "sequence=4", "--rounds", "3"), 2, "--rounds 3"),
        (("model.onnx", "--size", "sequence=4", "--runtime", "tensorrt"), 2, "is no plan"),
        (("model.onnx", "--size", "sequence=4", "--against", "half.onnx"), 3, "twins of one model"),
        (("noise.onnx",), 3, "not a readable ONNX file"),
        (("negative.onnx", "--size", "sequence=4"), 3, "negative.onnx: tensor 'tokens' has the dimension -1"),
        (("model.onnx", "--size", "sequence=4", "--against", "model.onnx"), 2, "is given twice"),
        (("model.onnx", "--size", "sequence=4", "--batches", "1000000000000"), 2, "Give smaller sizes or batches"),
        (("model.onnx", "--size", "sequence=4", "--batches", "9" * 30), 2, "whole numbers"),
        (("model.onnx", "--size", "sequence=4", "--against", "absent.plan"), 3, "absent.plan"),
    ],
)
def test_mistakes(tnm: Tnm, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    write(tmp_path / "model.onnx")
    write(tmp_path / "half.onnx", half=True)
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    write(tmp_path / "negative.onnx", -1)
    ended = tnm("bench", *arguments)
    assert ended.code == code, ended.err
    assert said in " ".join(ended.err.split())


def test_a_file_that_cannot_run_says_with_which_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    feeds = made_up(inputs_of(path), {"batch": 2, "sequence": 3})
    with ForeignSession(path) as session:
        assert session.run(feeds)["output"].shape == (2, 3, 8)
        with pytest.raises(
            ExportRejected, match=r"(?s)model\.onnx fails on made-up inputs \(tokens int64 \(2, 3\).*fit"
        ):
            session.run(feeds | {"tokens": feeds["tokens"] + 9})


def test_made_up_inputs_have_the_types_that_are_asked_for(tmp_path: Path) -> None:
    feeds = made_up(inputs_of(write(tmp_path / "model.onnx", half=True)), {"batch": 64, "sequence": 8})
    assert list(feeds) == ["tokens", "features"]  # the weight is none
    assert [array.dtype.name for array in feeds.values()] == ["int64", "float16"]
    assert set(np.unique(feeds["tokens"])) == {0, 1}
    assert feeds["features"].std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("model.fp16.plan", "model.fp16.dense.plan"),
        ("engine.plan", "model.fp16.dense.plan"),
        ("model.fp32.onnx", "dense.fp32.onnx"),
        ("model.fp16.onnx", None),
        ("other.plan", None),
        ("dense.fp32.onnx", None),
        ("model.fp16.dense.plan", None),
    ],
)
def test_the_twin_that_lies_beside_it(tmp_path: Path, name: str, twin: str | None) -> None:
    for there in ("model.fp16.dense.plan", "dense.fp32.onnx"):
        (tmp_path / there).touch()
    assert twin_of(tmp_path / name) == (None if twin is None else tmp_path / twin)


def test_an_operator_nobody_knows(tnm: Tnm, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    ended = tnm("bench", "model.onnx", "--size", "sequence=4")
    assert ended.code == 3, ended.err
    assert "refuses model.onnx" in ended.err


def test_our_own_twins_and_a_plan_without_a_gpu(tnm: Tnm, small_run: Path) -> None:
    run = small_run / "run"
    found = timed(tnm, str(run / "export/model.fp32.onnx"), "--batches", "2")
    assert found["against"] == str(run / "export/dense.fp32.onnx")
    plan = str(run / "build/model.fp16.plan")
    ended = tnm("bench", plan, "--batches", "1,2,4096")
    if ended.code != 0:  # no GPU here
        assert ended.code == 4, ended.err
        assert "needs a GPU" in ended.err
        assert f"`tnm-pipeline bench {plan} --runtime onnxruntime`" in ended.err
    found = timed(tnm, plan, "--runtime", "onnxruntime", "--batches", "2")
    assert (found["backend"], found["against"]) == ("onnxruntime", None)
    assert found["artifact"].endswith("model.fp16.onnx")
    ended = tnm("bench", plan, "--against", str(run / "export/model.fp16.onnx"))
    assert ended.code == 2, ended.err
    assert "such a difference is none of sparsity" in ended.err


def test_another_file_in_the_place_of_the_source(tnm: Tnm, small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "run", tmp_path / "run")
    write(tmp_path / "run/export/model.fp16.onnx")
    ended = tnm("bench", "run/build/model.fp16.plan", "--runtime", "onnxruntime", "--batches", "2")
    assert ended.code == 3, ended.err
    assert "model.fp16.plan was built from" in ended.err
