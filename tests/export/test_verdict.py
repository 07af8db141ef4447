"""Every reason comes out of a real graph, plan, or wording of a log, and the decision tree has each as a leaf."""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from tests.export.conftest import Exported
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.export.building.log import BuildLog
from tnm_pipeline.export.reasons import REASONS, Finding
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.export.tensorrt import build_plan
from tnm_pipeline.export.verdict import LayerVerdict, Verdict, verdict
from tnm_pipeline.export.verdicts.comparison import compare_twins, launch_finding, runtime_finding
from tnm_pipeline.export.verdicts.sightings import PlanFacts
from tnm_pipeline.training.pattern import Pattern

Array = NDArray[Any]
ROOT = Path(__file__).parents[2]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)


def _save(path: Path, nodes: Sequence[NodeProto], tensors: Mapping[str, Array], shape: Sequence[str | int]) -> Path:
    """A graph from `x` to `y`, of the first tensor's floating type."""
    dtype = helper.np_dtype_to_tensor_dtype(next(array.dtype for array in tensors.values() if array.dtype.kind == "f"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, [f"y{axis}" for axis in range(len(shape))])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _sparse(*shape: int, axis: int = 1, n: int = 2, m: int = 4, dtype: type = np.float16) -> Array:
    """All ones but the last m - n of every m along an axis."""
    pattern = np.arange(shape[axis]) % m < n
    return np.broadcast_to(np.expand_dims(pattern, [i for i in range(len(shape)) if i != axis]), shape).astype(dtype)


def _gemm(tmp_path: Path, weight: Array) -> Path:
    """One Linear, weight (O, I)."""
    node = helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="fc", transB=1)
    return _save(tmp_path / "gemm.onnx", [node], {"fc.weight": weight}, ["batch", weight.shape[1]])


def _conv(tmp_path: Path, weight: Array, *, op: str = "Conv", group: int = 1) -> Path:
    channels = weight.shape[0] if op == "ConvTranspose" else weight.shape[1] * group
    node = helper.make_node(op, ["x", "conv.weight"], ["y"], name="conv", group=group)
    return _save(tmp_path / "conv.onnx", [node], {"conv.weight": weight}, ["batch", channels, "h", "w"])


def _one(path: Path, plan: PlanFacts | None = None, pattern: str | None = None) -> LayerVerdict:
    report = inspect_onnx(path, default=None if pattern is None else Pattern.parse(pattern))
    (layer,) = verdict(path, report, plan).layers
    return layer


def _why(path: Path, plan: PlanFacts | None = None, pattern: str | None = None) -> Finding:
    (why,) = _one(path, plan, pattern).why
    return why


def _risk(path: Path, key: str) -> Finding:
    return next(risk for risk in _one(path).risks if risk.key == key)


def _manifest(**changes: Any) -> Manifest:
    """Of a plan that TensorRT built on an H200."""
    manifest = Manifest(
        artifact="model.plan",
        sha256="0" * 64,
        bytes=1,
        backend="tensorrt",
        backend_version="11.0",
        precision="fp16",
        inputs=(TensorSpec("x", "float16", ("batch", 256)),),
        outputs=(TensorSpec("y", "float16", ("batch", 256)),),
        source_onnx="model.onnx",
        source_sha256="1" * 64,
        sparse_weights_flag=True,
        compute_capabilities=("9.0",),
        gpu="NVIDIA H200",
        driver="CUDA 13.0",
        sparsity={},
    )
    return replace(manifest, **changes)


def _logged(*lines: str, **changes: Any) -> PlanFacts:
    """What is read from the lines of a builder's log."""
    log = BuildLog([("VERBOSE", line) for line in lines])
    return PlanFacts(
        _manifest(), log.eligible_layers, log.picked_layers, log.eligible_names, log.picked_names, **changes
    )


def _inspected(*entries: dict[str, Any]) -> PlanFacts:
    return PlanFacts(_manifest(), inspector=entries)


def _large(tmp_path: Path) -> Path:
    return _gemm(tmp_path, _sparse(256, 256))


def _unstructured(*shape: int) -> Array:
    return (np.random.default_rng(0).random(shape) < 0.5).astype(np.float16)


def _across_positions(tmp_path: Path) -> Path:
    """Pruned as rows of memory: two of the four positions of each kernel are gone, of all channels."""
    return _conv(tmp_path, _sparse(8, 32).reshape(8, 8, 2, 2))


def _left(tmp_path: Path) -> Path:
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    return _save(tmp_path / "left.onnx", [node], {"w": _sparse(8, 8)}, [8, "n"])


def _vector(tmp_path: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Identity", ["s"], ["y"])]
    path = _save(tmp_path / "vector.onnx", nodes, {"w": _sparse(1, 8)[0]}, ["batch", 8])
    model = onnx.load(path)
    del model.graph.output[0].type.tensor_type.shape.dim[1]
    onnx.save(model, path)
    return path


def _computed(tmp_path: Path) -> Path:
    nodes = [helper.make_node("Neg", ["w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    return _save(tmp_path / "computed.onnx", nodes, {"w": _sparse(8, 8, axis=0)}, ["batch", 8])


def _quantised(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    tensors = {"q": _sparse(256, 256, axis=0, dtype=np.int8), "scale": np.ones((), np.float32)}
    return _save(tmp_path / "q.onnx", nodes, tensors, ["batch", 256])


FOUND = "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: fc"
CASES: dict[str, Callable[[Path], Finding | None]] = {
    "not-pruned": lambda tmp: _why(_gemm(tmp, np.ones((8, 8), np.float16))),
    "breaks-pattern": lambda tmp: _why(_gemm(tmp, _unstructured(8, 8))),
    "wrong-axis": lambda tmp: _why(_gemm(tmp, _sparse(8, 8, axis=0))),
    "wrong-axis-convolution": lambda tmp: _why(_across_positions(tmp)),
    "other-pattern": lambda tmp: _why(_gemm(tmp, _sparse(8, 8, n=4, m=8))),
    "length-not-multiple": lambda tmp: _why(_gemm(tmp, _sparse(8, 10))),
    "stem": lambda tmp: _why(_conv(tmp, np.ones((8, 3, 3, 3), np.float16))),
    "grouped-convolution": lambda tmp: _why(_conv(tmp, _sparse(8, 4, 3, 3), group=2)),
    "transposed-convolution": lambda tmp: _why(_conv(tmp, _sparse(8, 8, 2, 2), op="ConvTranspose")),
    "left-operand": lambda tmp: _why(_left(tmp)),
    "vector": lambda tmp: _why(_vector(tmp)),
    "computed-weight": lambda tmp: _why(_computed(tmp)),
    "no-plan": lambda tmp: _why(_large(tmp)),
    "flag-off": lambda tmp: _why(_large(tmp), PlanFacts(_manifest(sparse_weights_flag=False))),
    "gpu-too-old": lambda tmp: _why(_large(tmp), PlanFacts(_manifest(compute_capabilities=("7.5",)))),
    "rtx-silent": lambda tmp: _why(_large(tmp), PlanFacts(_manifest(backend="tensorrt_rtx", gpu=None))),
    "builder-silent": lambda tmp: _why(_large(tmp), _logged("nothing about sparsity")),
    "fused-away": lambda tmp: _why(
        _large(tmp),
        _logged(
            "(Sparsity) Layers eligible for sparse math: __myl_MulSum_myl0_3",
            "(Sparsity) TRT inference plan picked sparse implementation for layers: __myl_MulSum_myl0_3",
        ),
    ),
    "fused-region": lambda tmp: _why(
        _large(tmp),
        _inspected({"Name": "{ForeignNode[a...b]}", "TacticName": "0x0", "Metadata": "[ONNX Layer: fc]\x1e"}),
    ),
    "builder-disagrees": lambda tmp: _why(
        _large(tmp),
        _logged(
            "(Sparsity) Layers eligible for sparse math:",
            "(Sparsity) TRT inference plan picked sparse implementation for layers:",
        ),
    ),
    "dense-tactic": lambda tmp: _why(_large(tmp), _logged(FOUND, "(Sparsity) Chose 0 layer(s) using sparse tactics: ")),
    "small-layer": lambda tmp: _risk(_gemm(tmp, _sparse(255, 256)), "small-layer"),
    "not-aligned": lambda tmp: _risk(_gemm(tmp, _sparse(256, 260)), "not-aligned"),
    "quantised": lambda tmp: _risk(_quantised(tmp), "quantised"),
    "precision-fp32": lambda tmp: _risk(_gemm(tmp, _sparse(256, 256, dtype=np.float32)), "precision-fp32"),
    "wrong-runtime": lambda tmp: runtime_finding("onnxruntime"),
    "twins-differ": lambda tmp: compare_twins(_manifest(), _manifest(precision="fp32", sparse_weights_flag=False)),
    "launch-bound": lambda tmp: launch_finding({1: 100.0, 2: 104.0, 8: 109.0, 64: 400.0}, 1),
}
MEASURED = {"not-measured", "gpu-throttled", "gpu-shared", "spread-too-wide", "no-difference", "dense-faster"}


@pytest.mark.parametrize("key", CASES)
def test_every_reason_is_found_where_it_is_the_case(key: str, tmp_path: Path) -> None:
    found = CASES[key](tmp_path)
    assert found is not None
    assert found.key == key
    assert "{" not in found.message.replace("{ForeignNode", "")
    assert str(found) == f"{found.message}: {found.remedy} [{key}]"


def test_there_are_no_other_reasons() -> None:
    """Those of measurements come out of `export.latency` and `export.gpu_state`, whose tests have them."""
    assert set(CASES) | MEASURED == set(REASONS)
    assert not set(CASES) & MEASURED


def test_the_decision_tree_has_every_reason_as_a_leaf_once() -> None:
    tree = (ROOT / "docs/not-faster.md").read_text(encoding="utf-8")
    leaves = re.findall(r"→ `([a-z0-9-]+)`\n", tree)
    assert sorted(leaves) == sorted(REASONS)
    assert tree.count("→") == len(leaves)
    assert "](not-faster.md)" in (ROOT / "docs/guide.md").read_text(encoding="utf-8")


def test_a_large_aligned_half_precision_layer_carries_no_risk(tmp_path: Path) -> None:
    layer = _one(_large(tmp_path))
    assert (layer.eligible, layer.risks) == (True, ())
    # A 3x3 kernel multiplies the length of the product by nine.
    assert [risk.key for risk in _one(_conv(tmp_path, _sparse(256, 32, 3, 3))).risks] == []
    assert [risk.key for risk in _one(_conv(tmp_path, _sparse(256, 32, 1, 1))).risks] == ["small-layer"]


@pytest.mark.parametrize(
    ("weight", "pattern", "expected"),
    [
        (_sparse(8, 8), "2:4", (True, False, True)),
        (_sparse(8, 8), "2:4-T", (True, False, True)),
        (np.kron(np.ones((4, 4)), np.eye(2)).astype(np.float16), "2:4-T", (True, True, True)),
        (_sparse(8, 8, n=4, m=8), "4:8", (True, False, False)),
        (_sparse(8, 8, n=1), None, (True, False, True)),
    ],
)
def test_both_directions(weight: Array, pattern: str | None, expected: tuple[bool, bool, bool], tmp_path: Path) -> None:
    layer = _one(_gemm(tmp_path, weight), pattern=pattern)
    assert (layer.holds, layer.holds_transposed, layer.eligible) == expected
    assert (layer.flag_set, layer.picked) == (None, None)


def test_a_promised_pattern_that_is_broken_is_not_called_held(tmp_path: Path) -> None:
    why = _why(_gemm(tmp_path, _unstructured(8, 16)), pattern="4:8")
    assert why.key == "breaks-pattern"
    assert _why(_gemm(tmp_path, _sparse(8, 16, n=4, m=8)), pattern="4:8").message.startswith("it holds 4:8")


def _network(tmp_path: Path) -> Path:
    """Three products of which the last has no name, with a name in torch's style and one with dots."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="/layers.0/fc/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b"], ["g"], name="mix"),
        helper.make_node("MatMul", ["g", "c"], ["y"]),
    ]
    weights = {name: _sparse(256, 256, axis=0) for name in "abc"}
    return _save(tmp_path / "network.onnx", nodes, weights, ["batch", 256])


def _network_verdict(tmp_path: Path, plan: PlanFacts) -> Verdict:
    path = _network(tmp_path)
    return verdict(path, inspect_onnx(path), plan)


def _picked(found: Verdict) -> list[bool | None]:
    return [layer.picked for layer in found.layers]


def test_names_of_the_log(tmp_path: Path) -> None:
    found = _network_verdict(
        tmp_path,
        _logged(
            "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: /layers.0/fc/MatMul + relu, mix_0, node_of_y",
            "(Sparsity) Chose 1 layer(s) using sparse tactics: /layers.0/fc/MatMul + relu",
        ),
    )
    assert _picked(found) == [True, False, False]
    assert [[why.key for why in layer.why] for layer in found.layers] == [[], ["dense-tactic"], ["dense-tactic"]]
    assert found.layers[0].seen_as == ("/layers.0/fc/MatMul + relu",)
    assert found.summary == "3 of 3 layers eligible, flag set, 1 picked by the builder"
    assert found.unmapped == ()


def test_a_layer_that_was_picked_needs_no_excuse(tmp_path: Path) -> None:
    layer = _one(_gemm(tmp_path, _sparse(8, 8)), _logged(FOUND, "(Sparsity) Chose 1 layer(s) using sparse tactics: fc"))
    assert (layer.picked, layer.why, layer.risks, layer.seen_as) == (True, (), (), ("fc",))


def test_a_name_that_is_not_understood_leaves_the_others_open(tmp_path: Path) -> None:
    found = _network_verdict(
        tmp_path,
        _logged(
            "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: /layers.0/fc/MatMul, mix, node_of_y",
            "(Sparsity) Chose 2 layer(s) using sparse tactics: mix, {ForeignNode[w2...mul_1]}",
        ),
    )
    assert _picked(found) == [None, True, None]
    assert found.unmapped == ("{ForeignNode[w2...mul_1]}",)
    assert found.summary == "3 of 3 layers eligible, flag set, 2 picked by the builder"


@pytest.mark.parametrize(
    ("lines", "keys"),
    [
        # A count that does not go with its names says nothing about one layer.
        (["(Sparsity) Found 3 layer(s) eligible to use sparse tactics"], ["builder-silent"] * 3),
        (
            ["(Sparsity) Found 2 layer(s) eligible to use sparse tactics: mix, node_of_y"],
            ["builder-disagrees", "builder-silent", "builder-silent"],
        ),
        (["(Sparsity) Chose 0 layer(s) using sparse tactics"], ["dense-tactic"] * 3),
        (["(Sparsity) Chose 1 layer(s) using sparse tactics: {ForeignNode[a...b]}"], ["fused-away"] * 3),
    ],
)
def test_half_of_a_log(lines: list[str], keys: list[str], tmp_path: Path) -> None:
    found = _network_verdict(tmp_path, _logged(*lines))
    assert [layer.why[0].key for layer in found.layers] == keys


def test_a_node_without_outputs_is_passed_over(tmp_path: Path) -> None:
    path = _large(tmp_path)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Print", ["y"], [], domain="company"))
    model.opset_import.append(helper.make_opsetid("company", 1))
    onnx.save(model, path)
    assert _one(path, _logged(FOUND, "(Sparsity) Chose 1 layer(s) using sparse tactics: fc")).picked


def test_what_the_inspector_shows(tmp_path: Path) -> None:
    """Weights that fit are no sparse tactic: only the tactic's name tells, in the forms of the inspector's JSON."""
    found = _network_verdict(
        tmp_path,
        _inspected(
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to /layers.0/fc/MatMul",
                "LayerType": "Reformat",
                "TacticValue": "0x00000000000003e8",
                "Metadata": "",
            },
            {
                "Name": "/layers_0/fc/MatMul+mix_myl0_7",
                "LayerType": "gemm",
                "HasSparseWeights": 1,
                "TacticName": "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1",
                "Metadata": "[ONNX Layer: /layers.0/fc/MatMul]\x1e[ONNX Layer: relu]\x1e",
            },
            {
                "Name": "mix",
                "LayerType": "CaskGemmMatrixMultiply",
                "TacticName": "sm80_xmma_gemm_sparse_f16f16_f16f16_f16_tn_n_tilesize128x64x64_stage3",
                "Metadata": "[ONNX Layer: mix]",
            },
        ),
    )
    assert _picked(found) == [False, True, None]
    assert "sm80_xmma_gemm_f16f16_f16f16" in found.layers[0].why[0].message
    assert found.layers[2].why[0].key == "fused-away"
    assert found.summary == "3 of 3 layers eligible, flag set, 1 observed as picked: 1 not observed"


def test_a_region_is_named_only_to_the_nodes_that_went_into_it(tmp_path: Path) -> None:
    regions = {"{ForeignNode[b...mix]}": "[ONNX Layer: relu]\x1e[ONNX Layer: mix]"}
    found = _network_verdict(tmp_path, PlanFacts(_manifest(), inspector=[{"Name": "other"}], regions=regions))
    assert [layer.why[0].key for layer in found.layers] == ["fused-away", "fused-region", "fused-away"]


@pytest.mark.parametrize(
    ("plan", "summary"),
    [
        (None, "1 of 1 layers eligible; no plan was built"),
        (
            PlanFacts(_manifest(sparse_weights_flag=False)),
            "1 of 1 layers eligible, flag not set, so the builder was allowed no sparse tactic",
        ),
        (
            PlanFacts(_manifest(backend="tensorrt_rtx", gpu=None)),
            "1 of 1 layers eligible, flag set, 0 observed as picked: built without a GPU, so no tactic was chosen here",
        ),
        (
            PlanFacts(_manifest(backend="tensorrt_rtx")),
            "1 of 1 layers eligible, flag set, 0 observed as picked: "
            "TensorRT for RTX chooses tactics where the plan is loaded",
        ),
        (_logged("silence"), "1 of 1 layers eligible, flag set, 0 observed as picked: the builder did not say"),
    ],
)
def test_summary(plan: PlanFacts | None, summary: str, tmp_path: Path) -> None:
    path = _large(tmp_path)
    assert verdict(path, inspect_onnx(path), plan).summary == summary


def test_twins_of_one_build_and_batches_that_scale_are_no_finding() -> None:
    assert compare_twins(_manifest(), _manifest(sparse_weights_flag=False, sha256="2" * 64, bytes=2)) is None
    seen = {**_manifest().sparsity, "verdict": {"summary": "flag not set"}}
    assert compare_twins(_manifest(), _manifest(sparsity=seen, provenance={"settings_sha256": "3" * 64})) is None
    assert compare_twins(_manifest(), _manifest(sparsity={**seen, "layers": 99})) is not None
    assert runtime_finding(_manifest().backend) is None
    assert launch_finding({1: 100.0, 2: 150.0, 8: 600.0}, 1) is None
    assert launch_finding({1: 100.0, 2: 100.0, 8: 600.0}, 2) is None
    assert launch_finding({4: 100.0, 6: 105.0, 16: 300.0}, 4) is None


def test_exported_layers_by_name(conv_net: Exported) -> None:
    found = verdict(conv_net.fp16, inspect_onnx(conv_net.fp16))
    keys = {layer.name: layer.why[0].key for layer in found.layers}
    assert keys == {"stem": "stem", "block.0": "no-plan", "grouped": "grouped-convolution", "head": "not-pruned"}
    assert found.summary == "1 of 4 layers eligible; no plan was built"
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["why"][0]["key"] == "stem"


@needs_rtx
def test_a_real_plan_of_tensorrt_for_rtx(mlp: Exported, tmp_path: Path) -> None:
    report = inspect_onnx(mlp.fp16)
    build = build_plan(
        mlp.fp16,
        tmp_path / "m.plan",
        sparse=True,
        precision="fp16",
        sparsity=report.summary(),
        backend="tensorrt_rtx",
        compute_capabilities=("8.9",),
    )
    facts = PlanFacts.of(build)
    first, second = verdict(mlp.fp16, report, facts).layers
    assert (first.eligible, first.flag_set, first.picked) == (True, True, None)
    assert [risk.key for risk in first.risks] == ["small-layer"]
    assert [why.key for why in second.why] == ["not-pruned"]
    assert any(first.node in metadata and second.node in metadata for metadata in facts.regions.values())
    if build.manifest.gpu is None:
        assert [why.key for why in first.why] == ["rtx-silent"]
