"""The counts against loops written out here, on graphs made by hand and by torch."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.export.conftest import Exported
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.sparsity import LayerSparsity, inspect_onnx
from tnm_pipeline.training.pattern import Pattern

P24, P24T, P48 = Pattern(2, 4), Pattern(2, 4, transposable=True), Pattern(4, 8)
Array = NDArray[Any]


def _save(path: Path, nodes: Sequence[NodeProto], tensors: dict[str, Array], rank: int, in_features: int) -> Path:
    """A graph `input` -> `output` whose shapes beyond the rank are left open."""
    shape: list[str | int] = [f"d{axis}" for axis in range(rank)]
    shape[1 if rank == 4 else -1] = in_features
    dtype = TensorProto.FLOAT
    for node in nodes[-1:]:
        weight = tensors.get(node.input[1])
        if weight is not None:
            dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info("output", dtype, [f"o{axis}" for axis in range(rank)])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def _one(path: Path, pattern: Pattern | None = P24T) -> LayerSparsity:
    (layer,) = inspect_onnx(path, default=pattern).layers
    return layer


def _loops(matrix: Array, n: int, m: int) -> int:
    """Groups of M consecutive entries of a row of (O, K) with more than N non-zeros."""
    count = 0
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], m):
            count += sum(bool(value != 0) for value in matrix[row, start : start + m]) > n
    return count


def _random_2_4(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    for row in range(out_features):
        for start in range(0, in_features, 4):
            weight[row, start + rng.choice(4, 2, replace=False)] = 0
    return weight


@pytest.mark.parametrize("pattern", [P24T, P48, Pattern(1, 4), Pattern(3, 5)])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 16), (6, 10), (3, 7)])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_against_loops(
    pattern: Pattern, out_features: int, in_features: int, trans_b: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(out_features)
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    node = helper.make_node("Gemm", ["input", "fc.weight"], ["output"], transB=trans_b)
    stored = weight if trans_b else np.ascontiguousarray(weight.T)
    layer = _one(_save(tmp_path / "m.onnx", [node], {"fc.weight": stored}, 2, in_features), pattern)
    assert (layer.name, layer.op, layer.gemm_shape) == ("fc", "Gemm", (out_features, in_features))
    assert layer.violations == _loops(weight, pattern.n, pattern.m)
    assert layer.violations_transposed == _loops(weight.T, pattern.n, pattern.m)
    assert layer.groups == out_features * len(range(0, in_features, pattern.m))
    assert layer.density == pytest.approx(np.count_nonzero(weight) / weight.size)
    assert layer.eligible == (in_features % 4 == 0 and _loops(weight, 2, 4) == 0)
    assert layer.eligible == (layer.why == "")


def test_conv_is_counted_per_kernel_position(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((6, 8, 3, 2)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.6] = 0
    node = helper.make_node("Conv", ["input", "conv.weight"], ["output"])
    layer = _one(_save(tmp_path / "m.onnx", [node], {"conv.weight": weight}, 4, 8))
    positions = [weight[:, :, y, x] for y in range(3) for x in range(2)]
    assert layer.violations == sum(_loops(position, 2, 4) for position in positions)
    assert layer.violations_transposed == sum(_loops(position.T, 2, 4) for position in positions)
    assert layer.gemm_shape == (6, 48)
    assert layer.groups == 6 * 2 * 6


def test_batched_matmul(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((3, 8, 5)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    node = helper.make_node("MatMul", ["input", "experts"], ["output"])
    layer = _one(_save(tmp_path / "m.onnx", [node], {"experts": weight}, 3, 8))
    assert layer.violations == sum(_loops(matrix.T, 2, 4) for matrix in weight)
    assert layer.violations_transposed == sum(_loops(matrix, 2, 4) for matrix in weight)
    assert layer.gemm_shape == (5, 8)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_weight_on_the_left_is_listed_and_not_eligible(op: str, tmp_path: Path) -> None:
    weight = np.tile(np.array([1, 1, 0, 0], np.float32), (4, 2))  # (O, K): 2:4 along K, not along O
    stored = weight.T.copy() if op == "Gemm" else weight
    node = helper.make_node(op, ["w", "input"], ["output"])
    if op == "Gemm":
        node.attribute.append(helper.make_attribute("transA", 1))
    layer = _one(_save(tmp_path / "m.onnx", [node], {"w": stored}, 8, 3), P24)
    assert (layer.gemm_shape, layer.violations, layer.violations_transposed) == ((4, 8), 0, 4)
    assert layer.holds
    assert not layer.eligible
    assert "left operand" in layer.why


def test_blocks_of_one_row_are_not_transposable(tmp_path: Path) -> None:
    """16 consecutive weights of a row, folded into a 4 x 4 tile that is 2:4 both ways, prove nothing about W^T."""
    tile = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    impostor = np.tile(tile.reshape(1, 16), (4, 1))  # every row the same: columns of 4 ones
    genuine = np.tile(tile, (1, 4))
    node = helper.make_node("Gemm", ["input", "w"], ["output"], transB=1)
    fake = _one(_save(tmp_path / "fake.onnx", [node], {"w": impostor}, 2, 16))
    real = _one(_save(tmp_path / "real.onnx", [node], {"w": genuine}, 2, 16))
    assert (fake.violations, fake.violations_transposed) == (0, 8)
    assert (real.violations, real.violations_transposed) == (0, 0)


@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("group", [0, 3])
def test_one_element_breaks_one_group(row: int, group: int, tmp_path: Path) -> None:
    weight = _random_2_4(np.random.default_rng(7), 8, 16)
    column = group * 4 + int(np.flatnonzero(weight[row, group * 4 : group * 4 + 4] == 0)[0])
    weight[row, column] = 1e-7
    node = helper.make_node("Gemm", ["input", "fc.weight"], ["output"], transB=1)
    layer = _one(_save(tmp_path / "m.onnx", [node], {"fc.weight": weight}, 2, 16), P24)
    assert (layer.violations, layer.eligible, layer.why) == (1, False, "breaks 2:4 in 1 groups")


def test_dtypes_and_nodes_between_weight_and_product(tmp_path: Path) -> None:
    weight = _random_2_4(np.random.default_rng(8), 8, 16)
    weight[0, :3] = 1  # one violation, to see that it is found through every detour
    matmul = helper.make_node("MatMul", ["input", "w"], ["output"])
    half = weight.T.astype(np.float16)
    brain = weight.T.astype(ml_dtypes.bfloat16)
    paths = [
        _save(tmp_path / "half.onnx", [matmul], {"w": half}, 2, 16),
        _save(tmp_path / "brain.onnx", [matmul], {"w": brain}, 2, 16),
    ]
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight.T.copy(), "v"))
    paths.append(_save(tmp_path / "constant.onnx", [constant, matmul], {}, 2, 16))
    detour = [
        helper.make_node("Transpose", ["stored"], ["turned"], perm=[1, 0]),
        helper.make_node("Identity", ["turned"], ["same"]),
        helper.make_node("Cast", ["same"], ["w"], to=TensorProto.FLOAT),
        matmul,
    ]
    paths.append(_save(tmp_path / "detour.onnx", detour, {"stored": weight.astype(np.float16)}, 2, 16))
    for path in paths:
        layer = _one(path)
        assert layer.violations == 1, path.name
        assert layer.violations_transposed == _loops(weight.T, 2, 4), path.name
        assert layer.gemm_shape == (8, 16), path.name


def test_quantised_zeros_are_zero_points(tmp_path: Path) -> None:
    weight = _random_2_4(np.random.default_rng(9), 8, 16)
    points = np.arange(8, dtype=np.int8) - 3
    quantised = np.where(weight == 0, 0, 20).astype(np.int8).T + points  # (K, O), one zero point per column
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "points"], ["w"], axis=1),
        helper.make_node("MatMul", ["input", "w"], ["output"]),
    ]
    tensors = {"q": quantised, "scale": np.ones(8, np.float32), "points": points}
    layer = _one(_save(tmp_path / "m.onnx", nodes, tensors, 2, 16))
    assert (layer.violations, layer.density, layer.eligible) == (0, 0.5, True)


def test_zero_that_a_cast_makes_counts_as_zero(tmp_path: Path) -> None:
    weight = np.full((4, 8), 1e-9, np.float32)
    nodes = [
        helper.make_node("Cast", ["stored"], ["small"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["small"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["input", "w"], ["output"]),
    ]
    assert _one(_save(tmp_path / "m.onnx", nodes, {"stored": weight}, 2, 4)).density == 0.0


def test_reasons(tmp_path: Path) -> None:
    dense = np.ones((8, 8, 3, 3), np.float32)
    conv = helper.make_node("Conv", ["input", "w"], ["output"])
    grouped = helper.make_node("Conv", ["input", "w"], ["output"], group=2)
    gemm = helper.make_node("Gemm", ["input", "w"], ["output"], transB=1)
    cases = [
        (conv, dense[:, :3], 4, 3, P24, "3 input channels are not a multiple of 4"),
        (grouped, dense, 4, 16, P24, "grouped convolution (2 groups)"),
        (conv, dense, 4, 8, P48, "pattern 4:8: TensorRT accelerates 2:4 only"),
        (conv, dense, 4, 8, None, "breaks 2:4 in 144 groups"),
        (gemm, dense[:, :, 0, 0].repeat(2, 1)[:, :10], 2, 10, P24, "K = 10 is not a multiple of 4"),
    ]
    for index, (node, weight, rank, in_features, pattern, why) in enumerate(cases):
        path = _save(tmp_path / f"{index}.onnx", [node], {"w": weight.copy()}, rank, in_features)
        layer = _one(path, pattern)
        assert (layer.eligible, layer.why) == (False, why)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_torch_layers_by_name(mlp: Exported, conv_net: Exported, tokens: Exported, precision: str) -> None:
    found = {}
    for exported, layer in ((mlp, "0"), (conv_net, "block.0"), (tokens, "mix.0")):
        report = inspect_onnx(getattr(exported, precision), {layer: P24})
        assert report.missing == ()
        assert report.violations == 0
        found.update({item.name: item for item in report.layers})
    assert set(found) == {"0", "2", "stem", "block.0", "grouped", "head", "embed", "mix.0", "mix.2", "out"}
    assert {name for name, item in found.items() if item.eligible} == {"0", "block.0", "mix.0"}
    assert found["stem"].why == "3 input channels are not a multiple of 4"
    assert found["grouped"].why == "grouped convolution (4 groups)"
    assert found["out"].why == "K = 10 is not a multiple of 4"


def test_totals_count_only_what_was_asked_for(mlp: Exported) -> None:
    report = inspect_onnx(mlp.fp32, {"0": P24T, "gone": P24})
    first, second = report.layers
    assert second.violations > 0
    assert first.violations_transposed > 0
    assert report.missing == ("gone",)
    assert report.summary() == {
        "layers": 2,
        "eligible": 1,
        "violations": 0,
        "violations_transposed": first.violations_transposed,
        "patterns": {"0": "2:4-T"},
    }
    assert json.loads(json.dumps(report.to_dict()))["per_layer"][0]["name"] == "0"


class Equal(nn.Module):
    """A tied weight, and two layers whose weights happen to be equal: the exporter keeps one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.logits = nn.Linear(16, 8, bias=False)
        self.logits.weight = self.embed.weight
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.logits(self.second(self.first(self.embed(tokens))))
        return scores


def test_shared_initializers_are_found_under_each_name(tmp_path: Path) -> None:
    export_onnx(Equal(), torch.zeros(2, 5, dtype=torch.int64), tmp_path / "m.onnx")
    report = inspect_onnx(tmp_path / "m.onnx", dict.fromkeys(("first", "second", "logits"), P24))
    assert [layer.name for layer in report.layers] == ["first", "second", "logits"]
    assert report.missing == ()


def test_activations_are_no_weights(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["input", "input"], ["output"])
    assert inspect_onnx(_save(tmp_path / "m.onnx", [node], {}, 2, 4)).layers == ()


def test_truncated_weight_is_refused(mlp: Exported, tmp_path: Path) -> None:
    model = onnx.load(mlp.fp32)
    weight = next(t for t in model.graph.initializer if t.name == "0.weight")
    weight.raw_data = weight.raw_data[:-4]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportRejected):
        inspect_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_polygraphy_agrees(name: str, request: pytest.FixtureRequest) -> None:
    """It reports per initializer and knows neither groups of a convolution nor bf16; elsewhere it must agree."""
    path = request.getfixturevalue(name).fp32
    polygraphy = Path(sys.executable).with_name("polygraphy")
    run = subprocess.run([polygraphy, "inspect", "sparsity", path], capture_output=True, text=True, check=True)
    theirs = set(re.findall(r"Found sparse tensor: (.*)\.weight", run.stdout + run.stderr))
    ours = {layer.name for layer in inspect_onnx(path).layers if layer.eligible}
    assert theirs == ours != set()
