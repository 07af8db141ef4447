"""What `bisect` says of two files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.pipeline.conftest import Ended
from tnm_pipeline.export.precision import retype

Tnm = Callable[..., Ended]


def write(folder: Path, scale: float, keep: tuple[str, ...] = ()) -> None:
    """x -> scale x -> its square -> the root of that, in fp32 and fp16."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "scale"], ["scaled"], "enlarge"),
            helper.make_node("Mul", ["scaled", "scaled"], ["square"], "square"),
            helper.make_node("Sqrt", ["square"], ["output"], "root"),
        ],
        "graph",
        [helper.make_tensor_value_info("input", 1, ["batch", "width"])],
        [helper.make_tensor_value_info("output", 1, ["batch", "width"])],
        [numpy_helper.from_array(np.asarray(scale, np.float32), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.fp32.onnx")
    retype(folder / "model.fp32.onnx", folder / "model.fp16.onnx", "fp16", keep=keep)


def test_the_culprit_the_worst_and_the_command(tnm: Tnm, tmp_path: Path) -> None:
    write(tmp_path, 900.0)
    ended = tnm("bisect", "model.fp32.onnx", "model.fp16.onnx", "--size", "width=8")
    assert ended.code == 0, ended.err
    assert "It starts at node 'square'" in ended.out
    assert "is beyond fp16" in ended.out
    assert """\n  --set export.keep_fp32='["square", "root"]'\n""" in ended.out
    assert "by adding to the command that exported it" in ended.out
    write(tmp_path, 900.0, keep=("square", "root"))
    ended = tnm("bisect", "model.fp32.onnx", "model.fp16.onnx", "--size", "width=8")
    assert "no layer departs" in ended.out


def test_the_command_names_the_run(tnm: Tnm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a run/export").mkdir(parents=True)
    write(tmp_path / "a run/export", 900.0)
    (tmp_path / "a run/config.toml").touch()
    names = [f"a run/export/model.{precision}.onnx" for precision in ("fp32", "fp16")]
    said = tnm("bisect", *names, "--size", "width=8", "--json").json()["command"]
    assert said == """tnm-pipeline export --folder 'a run' --set export.keep_fp32='["square", "root"]'"""
    monkeypatch.chdir(tmp_path / "a run/export")
    said = tnm("bisect", "model.fp32.onnx", "model.fp16.onnx", "--size", "width=8", "--json").json()["command"]
    assert f"--folder '{tmp_path / 'a run'}' --set" in said


def test_json_has_no_infinity(tnm: Tnm, tmp_path: Path) -> None:
    write(tmp_path, 900.0)
    np.savez(tmp_path / "calls.npz", input=np.full((2, 4), 3.0), other=np.zeros(1))
    ended = tnm("bisect", "model.fp32.onnx", "model.fp16.onnx", "--inputs", "calls.npz", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out, parse_constant=lambda text: pytest.fail(text))
    assert found["first"]["node"] == "square"
    assert found["first"]["own"] == "inf"
    assert found["inputs"] == "calls.npz"
    assert found["keep"] == ["square", "root"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "--size width=N"),
        (("--inputs", "absent.npz"), 3, "absent.npz is no .npz file"),
        (("--inputs", "model.fp16.onnx"), 3, "is no .npz file"),
        (("--inputs", "array.npy"), 3, "is no .npz file"),
        (("--inputs", "wrong.npz"), 3, "holds x and not input"),
    ],
)
def test_mistakes(tnm: Tnm, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    write(tmp_path, 1.0)
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    ended = tnm("bisect", "model.fp32.onnx", "model.fp16.onnx", *arguments)
    assert ended.code == code, ended.err
    assert said in " ".join(ended.err.split())
