"""Sessions of models that protobuf has no room for, with a limit of a byte in place of its own."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tests.export.conftest import Exported
from tnm_pipeline.export.cpu_session import open_emulated
from tnm_pipeline.export.node_runs import NodeRuns
from tnm_pipeline.export.precision import emulated

INPUTS: NDArray[np.float32] = np.random.default_rng(4).standard_normal((3, 16), np.float32)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_emulation_through_a_file_answers_alike(mlp: Exported, temporary: Path) -> None:
    inside, beside = (open_emulated(mlp.fp16, external_above=limit) for limit in (1 << 30, 1))
    answers = [np.asarray(session.run(["output"], {"input": INPUTS})[0]) for session in (inside, beside)]
    assert np.ptp(answers[0]) > 0
    np.testing.assert_array_equal(answers[0], answers[1])
    assert not list(temporary.iterdir())


def test_nodes_of_a_model_whose_weights_were_moved(mlp: Exported, temporary: Path) -> None:
    folder = mlp.fp16.parent
    inside = NodeRuns(emulated(mlp.fp16), folder, "model")
    beside = NodeRuns(emulated(mlp.fp16), folder, "model", external_above=1)
    assert [path.name for made in temporary.iterdir() for path in made.iterdir()] == ["weights"]
    weight = max(inside._weights, key=lambda name: len(inside._weights[name].raw_data))
    names = [weight, *(value for node in inside.nodes.values() for value in node.output)]
    expected = inside.values(names, {"input": INPUTS})
    for name, found in beside.values(names, {"input": INPUTS}).items():
        np.testing.assert_array_equal(found, expected[name])
    (key,) = [key for key, node in inside.nodes.items() if weight in node.input]
    given: list[Any] = [None if value is None else expected.get(value, INPUTS) for value in inside.varying(key)]
    np.testing.assert_array_equal(beside.alone({key: given})[key][0], inside.alone({key: given})[key][0])
    del beside
    gc.collect()
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_half_file_whose_emulation_is_beyond_protobufs_limit(tmp_path: Path, temporary: Path) -> None:
    side = 23_200
    assert 4 * side * side > 2**31 > 2 * side * side
    rows = np.zeros((side, side), np.float16)
    np.fill_diagonal(rows, 2)
    half, whole = TensorProto.FLOAT16, TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["x_half"], to=half),
            helper.make_node("MatMul", ["x_half", "w"], ["y_half"], "matmul"),
            helper.make_node("Cast", ["y_half"], ["y"], to=whole),
        ],
        "large",
        [helper.make_tensor_value_info("x", whole, ["batch", side])],
        [helper.make_tensor_value_info("y", whole, ["batch", side])],
        [TensorProto(name="w", data_type=half, dims=[side, side], raw_data=rows.tobytes())],
        value_info=[helper.make_tensor_value_info(name, half, ["batch", side]) for name in ("x_half", "y_half")],
    )
    path = tmp_path / "model.fp16.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    del graph, rows
    x = np.linspace(-1, 1, side, dtype=np.float32)[None]
    expected = 2 * x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(open_emulated(path).run(["y"], {"x": x})[0]), expected)
    assert not list(temporary.iterdir())
