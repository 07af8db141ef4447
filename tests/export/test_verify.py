import numpy as np
import pytest
from numpy.typing import NDArray

from tests.export.conftest import Exported
from tnm_pipeline.engines import ArtifactRejected, write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.errors import AccuracyGateFailed
from tnm_pipeline.export.verify import Parity, check, compare, verify_onnx

EXACT = Parity(max_abs=0.0, scaled=0.0, relative_to_absmax=0.0, cosine=1.0, top1_agreement=1.0)


def test_equal_outputs() -> None:
    outputs = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    parity = compare(outputs, outputs.copy())
    assert (parity.max_abs, parity.scaled, parity.relative_to_absmax, parity.top1_agreement) == (0, 0, 0, 1)
    assert parity.cosine == pytest.approx(1.0)


def test_figures_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [0.0, -8.0]])
    candidate = np.array([[4.0, 3.0], [0.0, -8.0]])
    parity = compare(reference, candidate)
    assert parity.max_abs == 1.0
    assert parity.scaled == parity.relative_to_absmax == 1 / 8
    assert parity.cosine == pytest.approx((12 + 12 + 64) / 89)
    assert parity.top1_agreement == 0.5


def test_worst_of_several_outputs() -> None:
    """The output with the largest relative error is not the one with the largest absolute error."""
    reference = {"small": np.array([0.001, 0.0]), "large": np.array([100.0, 0.0])}
    candidate = {"small": np.array([0.002, 0.0]), "large": np.array([100.5, 0.0])}
    parity = compare(reference, candidate)
    assert parity.max_abs == 0.5
    assert parity.scaled == pytest.approx(0.005)
    assert parity.relative_to_absmax == pytest.approx(1.0)


@pytest.mark.parametrize("place", ["reference", "candidate"])
def test_nan_never_passes(place: str) -> None:
    arrays = {"reference": np.ones((2, 3)), "candidate": np.ones((2, 3))}
    arrays[place][1, 2] = np.nan
    named = [{"a": np.zeros(1), "b": arrays[side], "c": np.zeros(1)} for side in ("reference", "candidate")]
    parity = compare(*named)
    for precision in ("fp32", "fp16"):
        with pytest.raises(AccuracyGateFailed, match="nan"):
            check(parity, precision)


def test_zero_reference() -> None:
    assert compare(np.zeros(3), np.zeros(3)) == EXACT
    assert compare(np.zeros(3), np.full(3, 1e-3)).relative_to_absmax == np.inf


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}),
        ({}, {}),
    ],
)
def test_nothing_comparable(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> None:
    with pytest.raises(AccuracyGateFailed):
        compare(reference, candidate)


def test_limits() -> None:
    check(EXACT, "fp32")
    close = compare(np.array([500.0, 0.0]), np.array([500.004, 0.0]))  # 8e-6 of 500
    check(close, "fp32")
    with pytest.raises(AccuracyGateFailed, match=r"scaled = 2e-05, the limit is 1e-05"):
        check(compare(np.array([0.5, 0.0]), np.array([0.50002, 0.0])), "fp32")
    with pytest.raises(AccuracyGateFailed, match=r"relative_to_absmax = 0.002, the limit is 0.0015"):
        check(compare(np.array([0.5, 0.0]), np.array([0.501, 0.0])), "fp16")


@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
def test_through_the_production_loader(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    inputs = np.random.default_rng(1).standard_normal((8, *exported.sample.shape[1:]), np.float32)
    for path, precision in ((exported.fp32, "fp32"), (exported.fp16, "fp16")):
        write_manifest(path, onnx_manifest(path, precision=precision, sparsity={}))
        answers, parity = verify_onnx(exported.torch_outputs(inputs), path, inputs, precision, batch=3)
        assert answers.shape == (8, *exported.torch_outputs(inputs).shape[1:])
        assert parity.cosine > 0.999
    with pytest.raises(AccuracyGateFailed, match="fp32 differs"):
        verify_onnx(exported.torch_outputs(inputs), exported.fp16, inputs, "fp32")


def test_edited_artifact_is_refused_before_it_runs(mlp: Exported) -> None:
    edited = mlp.fp32.with_name("edited.onnx")
    edited.write_bytes(mlp.fp32.read_bytes())
    write_manifest(edited, onnx_manifest(edited, precision="fp32", sparsity={}))
    edited.write_bytes(mlp.fp16.read_bytes())
    with pytest.raises(ArtifactRejected):
        verify_onnx(np.zeros((1, 8)), edited, np.zeros((1, 16), np.float32), "fp32")
