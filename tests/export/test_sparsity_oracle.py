"""The counts against loops over single entries on hundreds of graphs, and against polygraphy where it is right."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid
from polygraphy.tools.sparse import SparsityPruner
from torch import nn

from tests.export.graphs import tensor, write
from tests.export.random_graphs import sample
from tests.training import zoo
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.training.pattern import Pattern

P24 = Pattern(2, 4)
PATTERNS = (P24, Pattern(1, 4), Pattern(4, 8), Pattern(3, 5))


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_against_loops(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    for at in range(40):
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        drawn = sample(rng, tmp_path / f"{at}.onnx")
        report = inspect_onnx(drawn.path, default=pattern)
        (layer,) = report.layers
        told = (seed, at, drawn.operator, drawn.weight.shape)
        assert report.unread == (), told
        assert (layer.op, layer.shape) == (drawn.operator, drawn.weight.shape if layer.op != "Gemm" else layer.shape), (
            told
        )
        assert layer.violations == drawn.broken(pattern.n, pattern.m), told
        assert layer.violations_transposed == drawn.broken(pattern.n, pattern.m, transposed=True), told
        matrices = [np.array(rows) for rows in drawn.entries()]
        (outputs, inputs), positions = matrices[0].shape, len(matrices)
        assert layer.gemm_shape == (outputs, inputs * (positions if "Conv" in layer.op else 1)), told
        assert layer.groups == positions * outputs * len(range(0, inputs, pattern.m)), told
        assert layer.density == pytest.approx(np.mean(matrices)), told
        may = drawn.operator != "ConvTranspose" and not drawn.left and drawn.groups == 1 and inputs % 4 == 0
        assert layer.eligible == (may and not drawn.broken(2, 4)), told
        assert layer.eligible == (layer.why == ""), told


def _for_polygraphy(rng: np.random.Generator) -> onnx.ModelProto:
    """Where polygraphy is right: initializers in float32 and float16, on the right of products of rank 2.

    It misses Constant nodes, subgraphs, functions, float64 and integers, takes a batched MatMul along its first axis,
    follows a Transpose of rank 3 the wrong way, counts grouped convolutions and left operands, takes a quantised
    zero for a zero whatever the zero point is, and reads only the first of several bf16 groups.
    """
    nodes, weights = [], []
    for at in range(24):
        operator = str(rng.choice(["MatMul", "Gemm", "Conv"]))
        outputs, inputs = int(rng.integers(1, 9)), int(rng.choice([4, 6, 8, 12, 16]))
        kernel = rng.integers(1, 4, 2).tolist() if operator == "Conv" else []
        weight = rng.standard_normal((outputs, inputs, *kernel)).astype(rng.choice(["float32", "float16"]))
        hold = rng.random() < 0.6
        for start in range(0, inputs - 3, 4):
            weight[:, start : start + 2] = 0
        if not hold:
            weight[-1, -1], weight[-1, -4:] = 1, 1
        turned = operator == "Gemm" and rng.random() < 0.5
        stored = weight if operator == "Conv" or turned else weight.T
        weights.append(numpy_helper.from_array(np.ascontiguousarray(stored), f"w{at}"))
        attributes: dict[str, Any] = {"transB": 1} if turned else {}
        name = f"w{at}"
        if operator == "MatMul" and rng.random() < 0.5:
            weights[-1] = numpy_helper.from_array(weight, name)
            nodes.append(make_node("Transpose", [name], [f"t{at}"], perm=[1, 0]))
            name = f"t{at}"
        nodes.append(make_node(operator, [f"x{at}", name], [f"y{at}"], **attributes))
    inside = [tensor(f"x{at}", "any") for at in range(24)]
    outside = [tensor(f"y{at}", "any") for at in range(24)]
    return make_model(
        make_graph(nodes, "graph", inside, outside, weights), opset_imports=[make_opsetid("", 20)], ir_version=10
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # polygraphy's own
@pytest.mark.parametrize("seed", range(4))
def test_polygraphy_agrees_where_it_is_right(seed: int, tmp_path: Path) -> None:
    model = _for_polygraphy(np.random.default_rng(seed))
    onnx.save(model, tmp_path / "m.onnx")
    theirs: Any = SparsityPruner(model)
    theirs.check()
    ours = {layer.name for layer in inspect_onnx(tmp_path / "m.onnx").layers if layer.eligible}
    assert ours == theirs.sparse_tensors
    assert 0 < len(ours) < 24


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with two of four zero in every product."""
    model = zoo.minilm()[0].eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    export_onnx(model, [zoo.minilm_inputs(4)], path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # polygraphy's own
def test_minilm_counts_as_polygraphy_does(minilm: Path) -> None:
    """How much faster: `python scripts/bench_inspect.py`."""
    report = inspect_onnx(minilm)
    theirs: Any = SparsityPruner(onnx.load(minilm))
    theirs.check()
    assert {f"{layer.name}.weight" for layer in report.layers if layer.eligible} == theirs.sparse_tensors
    assert len(theirs.sparse_tensors) == 37  # six layers of six products, and the pooler


@pytest.mark.slow
def test_one_broken_group_in_minilm(minilm: Path, tmp_path: Path) -> None:
    model = onnx.load(minilm)
    broken = next(t for t in model.graph.initializer if t.name == "encoder.layer.3.output.dense.weight")
    weight = numpy_helper.to_array(broken).copy()  # (I, O)
    weight[512 + int(np.flatnonzero(weight[512:516, 100] == 0)[0]), 100] = 1e-6
    broken.CopyFrom(numpy_helper.from_array(weight, broken.name))
    onnx.save(model, tmp_path / "m.onnx")
    report = inspect_onnx(tmp_path / "m.onnx", default=P24)
    assert report.violations == 1
    (layer,) = (layer for layer in report.layers if not layer.holds)
    assert (layer.name, layer.why) == ("encoder.layer.3.output.dense", "breaks 2:4 in 1 groups")


def test_a_mask_along_the_wrong_axis(tmp_path: Path) -> None:
    """2:4 along the output channels, or along the kernel, or of the transpose, is not what TensorRT reads."""
    group = np.array([1, 1, 0, 0], np.float32)
    right = np.broadcast_to(group[None, :, None, None], (4, 4, 2, 4))
    cases = {"right": right, "outputs": right.swapaxes(0, 1), "kernel": right.swapaxes(1, 3)}
    found = {}
    for name, weight in cases.items():
        node = make_node("Conv", ["x", "w"], ["y"])
        weights = [numpy_helper.from_array(np.ascontiguousarray(weight), "w")]
        path = write(
            tmp_path / f"{name}.onnx", [node], [tensor("x", "n", 4, 8, 8)], [tensor("y", "n", 4, 7, 5)], weights=weights
        )
        (layer,) = inspect_onnx(path, default=P24).layers
        found[name] = (layer.violations, layer.eligible)
    assert found == {"right": (0, True), "outputs": (16, False), "kernel": (16, False)}
    for trans_b, eligible in ((1, True), (0, False)):
        weights = [numpy_helper.from_array(np.tile(group, (8, 2)), "w")]
        node = make_node("Gemm", ["x", "w"], ["y"], transB=trans_b)
        path = write(tmp_path / "gemm.onnx", [node], [tensor("x", "n", 8)], [tensor("y", "n", 8)], weights=weights)
        (layer,) = inspect_onnx(path).layers
        assert layer.eligible == eligible
