from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from polygraphy import constants
from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator
from torch import Tensor, nn

from tnm_pipeline.export import departure
from tnm_pipeline.export.departure import Departure, find_departure
from tnm_pipeline.export.errors import AccuracyGateFailed, ExportRejected
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import Half, emulated, retype

Feeds = Mapping[str, NDArray[Any]]
HALVES: tuple[Half, Half] = ("fp16", "bf16")


FEEDS: Feeds = {"input": np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)}


def beside(path: Path) -> Path:
    """The same model with its weights in another file."""
    apart = path.with_name("apart.onnx")
    onnx.save(onnx.load(path), apart, save_as_external_data=True, location="apart.data", size_threshold=64)
    path.unlink()
    return apart


def write(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", 1, ["batch", 16])],
        [helper.make_tensor_value_info("output", 1, ["batch", "outputs"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    return path


def norm(folder: Path, scale: float, offset: float) -> Path:
    """Two layers around a layer norm spelled out, whose input has the given scale and offset."""
    rng = np.random.default_rng(0)
    weights = {
        "before": (scale / 4 * rng.standard_normal((16, 32))).astype(np.float32),
        "offset": np.full(32, offset, np.float32),
        "after": (rng.standard_normal((32, 8)) / 4).astype(np.float32),
        "two": np.asarray(2.0, np.float32),
        "little": np.asarray(1e-5, np.float32),
        "last": np.asarray([-1]),
    }
    nodes = [
        helper.make_node("Gemm", ["input", "before", "offset"], ["hidden"], "before"),
        helper.make_node("ReduceMean", ["hidden", "last"], ["mean"], "mean"),
        helper.make_node("Sub", ["hidden", "mean"], ["centred"], "centre"),
        helper.make_node("Pow", ["centred", "two"], ["squares"], "square"),
        helper.make_node("ReduceMean", ["squares", "last"], ["variance"], "variance"),
        helper.make_node("Add", ["variance", "little"], ["positive"], "add"),
        helper.make_node("Sqrt", ["positive"], ["deviation"], "root"),
        helper.make_node("Div", ["centred", "deviation"], ["normal"], "divide"),
        helper.make_node("MatMul", ["normal", "after"], ["output"], "after"),
    ]
    return write(folder / "model.fp32.onnx", nodes, weights)


def found_in(path: Path, precision: Half, keep: tuple[str, ...] = (), feeds: Feeds = FEEDS) -> Departure:
    half = path.with_name(f"model.{precision}.onnx")
    retype(path, half, precision, keep=keep)
    return find_departure(path, half, feeds)


@pytest.mark.parametrize("precision", HALVES)
def test_a_healthy_network_departs_nowhere(tmp_path: Path, precision: Half) -> None:
    found = found_in(norm(tmp_path, 1.0, 0.0), precision)
    assert found.precision == precision
    assert found.passes
    assert found.first is None
    assert found.keep == ()
    assert found.compared == 9
    assert found.skipped == 0
    assert all(0 < error.own < found.limit for error in found.worst[:3])


def test_what_the_outputs_do_not_notice_is_no_departure(tmp_path: Path) -> None:
    weights = {"large": np.asarray(3e3, np.float32), "little": np.asarray(1e-4, np.float32)}
    nodes = [
        helper.make_node("Add", ["input", "large"], ["shifted"], "shift"),
        helper.make_node("Sub", ["shifted", "large"], ["coarse"], "shift back"),
        helper.make_node("Mul", ["coarse", "little"], ["hint"], "shrink"),
        helper.make_node("Add", ["input", "hint"], ["output"], "hint"),
    ]
    found = found_in(write(tmp_path / "model.fp32.onnx", nodes, weights), "fp16")
    assert found.passes
    assert (found.first, found.keep) == (None, ())
    assert found.worst[0].node == "shift back"
    assert found.worst[0].own > found.limit


def test_a_square_that_overflows_is_named(tmp_path: Path) -> None:
    path = norm(tmp_path, 300.0, 0.0)
    found = found_in(path, "fp16")
    assert not found.passes
    assert found.first is not None
    assert (found.first.node, found.first.op) == ("square", "Pow")
    assert found.first.own == np.inf
    assert found.first.largest > 65504
    assert found.first.of_inputs < found.limit  # the product before it is not to blame
    assert set(found.keep) == {"square", "variance", "add", "root"}

    kept = found_in(path, "fp16", found.keep)
    assert kept.passes
    assert kept.first is None
    assert found_in(path, "bf16").passes  # it has fp32's range


def test_a_difference_of_large_values_needs_what_gives_them(tmp_path: Path) -> None:
    """A large offset hides the differences between features in half: the layer that adds it is kept too."""
    path = norm(tmp_path, 1.0, 3000.0)
    found = found_in(path, "fp16")
    assert not found.passes
    assert found.first is not None
    assert found.first.node == "centre"
    assert found.first.of_inputs > found.limit
    assert {"before", "mean", "centre"} <= set(found.keep)
    assert found_in(path, "fp16", found.keep).passes


@pytest.mark.parametrize(("scale", "offset", "steps"), [(1.0, 20.0, 1), (1000.0, 30000.0, 2)])
def test_following_what_to_keep_ends(tmp_path: Path, scale: float, offset: float, steps: int) -> None:
    """Each list holds the one before it, for it replaces it; where none is to blame alone, the worst are kept."""
    path = norm(tmp_path, scale, offset)
    keep: tuple[str, ...] = ()
    for _ in range(steps):
        found = found_in(path, "fp16", keep)
        assert not found.passes
        assert set(keep) < set(found.keep)
        keep = found.keep
    last = found_in(path, "fp16", keep)
    assert (last.passes, last.keep) == (True, ())


def test_accumulated_errors_are_polygraphys(tmp_path: Path) -> None:
    path = norm(tmp_path, 300.0, 0.0)
    found = found_in(path, "fp16")
    marked = [
        ModifyOutputs(model, outputs=constants.MARK_ALL)
        for model in (onnx.load(path), emulated(tmp_path / "model.fp16.onnx"))
    ]
    runs = [OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(model))) for model in marked]
    results: Any = Comparator.run(runs, data_loader=[dict(FEEDS)])
    exact, half = (dict(results[run.name][0].items()) for run in runs)
    outputs = {node.name: node.output[0] for node in onnx.load(path).graph.node}
    compared = 0
    for error in found.worst:
        wanted = np.asarray(exact[outputs[error.node]], np.float64)
        given = half.get(outputs[error.node])
        if given is not None and np.isfinite(given := np.asarray(given, np.float64)).all():
            assert error.accumulated == pytest.approx(np.abs(wanted - given).max() / np.abs(wanted).max(), rel=1e-6)
            compared += 1
    assert compared


@pytest.mark.parametrize("placed", [Path, beside])
def test_small_chunks_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placed: Callable[[Path], Path]
) -> None:
    path = placed(norm(tmp_path, 300.0, 0.0))
    at_once = found_in(path, "fp16")
    monkeypatch.setattr(departure, "_AT_ONCE", 2)
    assert found_in(path, "fp16") == at_once


class Spelled(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()


def test_the_torch_layer_is_named(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("enlarge", nn.Linear(16, 16))
    model.add_module("block", nn.Sequential(Spelled()))
    nn.init.constant_(model.get_parameter("enlarge.weight"), 1e3)
    export_onnx(model, torch.from_numpy(FEEDS["input"]), tmp_path / "model.fp32.onnx")
    found = found_in(tmp_path / "model.fp32.onnx", "fp16")
    assert found.first is not None
    assert (found.first.op, found.first.layer) == ("Pow", "block.0")


def test_a_mask_is_no_departure(tmp_path: Path) -> None:
    """What -1e9 hides from a softmax is hidden by half's lowest number too; the overflow after it is found."""
    hidden = np.zeros((1, 16), np.float32)
    hidden[:, 9:] = -1e9
    weights = {"mask": hidden, "large": np.full((1, 16), 5e4, np.float32)}
    nodes = [
        helper.make_node("Add", ["input", "mask"], ["masked"], "mask scores"),
        helper.make_node("Softmax", ["masked"], ["attention"], "attend"),
        helper.make_node("Mul", ["attention", "large"], ["scaled"], "scale"),
        helper.make_node("ReduceSum", ["scaled"], ["sum"], "sum", keepdims=1),
        helper.make_node("Div", ["scaled", "sum"], ["output"], "divide"),
    ]
    path = write(tmp_path / "model.fp32.onnx", nodes, weights)
    found = found_in(path, "fp16")
    assert not found.passes
    assert found.first is not None
    assert found.first.node == "sum"
    by_node = {error.node: error.own for error in found.worst}
    assert by_node.get("mask scores", 0) < found.limit
    assert set(found.keep) == {"sum", "divide"}
    assert found_in(path, "fp16", found.keep).passes


def test_graphs_inside_nodes_are_counted_as_not_looked_into(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["input", "input"], ["twice"])],
        "b",
        [],
        [helper.make_tensor_value_info("twice", 1, ["batch", 16])],
    )
    nodes = [
        helper.make_node("Relu", ["input"], ["positive"], "relu"),
        helper.make_node("If", ["yes"], ["either"], "if", then_branch=body, else_branch=body),
        helper.make_node("Add", ["positive", "either"], ["output"], "add"),
    ]
    found = found_in(write(tmp_path / "m.onnx", nodes, {"yes": np.asarray(True)}), "fp16")
    assert found.passes
    assert found.compared == 2


def test_the_fp32_file_comes_first(tmp_path: Path) -> None:
    path = norm(tmp_path, 1.0, 0.0)
    found_in(path, "bf16")
    with pytest.raises(ExportRejected, match=r"model\.bf16\.onnx is in bf16 itself: give the fp32 file first"):
        find_departure(tmp_path / "model.bf16.onnx", path, FEEDS)


def test_a_file_without_types_is_not_taken_for_a_healthy_one(tmp_path: Path) -> None:
    path = norm(tmp_path, 300.0, 0.0)
    found_in(path, "fp16")
    model = onnx.load(tmp_path / "model.fp16.onnx")
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ExportRejected, match=r"bare\.onnx does not say in which type .*infer_shapes_path"):
        find_departure(path, tmp_path / "bare.onnx", FEEDS)
    onnx.shape_inference.infer_shapes_path(tmp_path / "bare.onnx", tmp_path / "typed.onnx")
    first = find_departure(path, tmp_path / "typed.onnx", FEEDS).first
    assert first is not None
    assert first.node == "square"


def test_two_models_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.onnx", [helper.make_node("Relu", ["input"], ["output"], "relu")], {})
    other = write(tmp_path / "two.onnx", [helper.make_node("ReduceSum", ["input"], ["output"], "sum")], {})
    with pytest.raises(AccuracyGateFailed, match="has shape"):
        find_departure(one, other, FEEDS)
    with pytest.raises(ExportRejected, match=r"(?s)cannot run one.onnx node by node.*Give inputs"):
        find_departure(one, one, {"input": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_depart_nowhere(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, nodes, value = {}, [], "input"
    for index in range(int(rng.integers(2, 6))):
        kind = rng.choice(["MatMul", "Relu", "Tanh", "Add", "LayerNormalization", "Softmax"])
        inputs = [value]
        if kind in ("MatMul", "Add", "LayerNormalization"):
            inputs.append(f"w{index}")
            shape = (16, 16) if kind == "MatMul" else (16,)
            weights[f"w{index}"] = (rng.standard_normal(shape) / 4).astype(np.float32)
        value = f"v{index}"
        nodes.append(helper.make_node(kind, inputs, [value], f"node {index}"))
    nodes[-1].output[0] = "output"
    found = found_in(write(tmp_path / "m.onnx", nodes, weights), HALVES[seed % 2])
    assert found.passes, found.parity
    assert found.first is None
