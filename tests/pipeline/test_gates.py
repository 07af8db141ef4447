"""When a verified model is good enough."""

from typing import Any

import pytest

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.export.errors import AccuracyGateFailed
from tnm_pipeline.pipeline.errors import LatencyGateFailed
from tnm_pipeline.pipeline.gates import refusal
from tnm_pipeline.pipeline.sections import VerifySection

ROWS = [{"name": "dense", "ratio": 1.0}, {"name": "sparse", "ratio": 0.8}]
TIMED = {"tensorrt": {"rows": ROWS, "claim": {"key": "faster", "sentence": "1.25 times as fast", "remedy": ""}}}
THROTTLED = {
    "tensorrt": {"rows": ROWS, "claim": {"key": "gpu-throttled", "sentence": "it slowed", "remedy": "cool it"}}
}


def verified(sparse: float = 0.9, dense: float | None = 0.92, latency: dict[str, Any] | None = None) -> dict[str, Any]:
    scores = {"onnx fp32": sparse} | ({} if dense is None else {"dense": dense})
    return {"scores": scores, "latency": latency or {}}


@pytest.mark.parametrize(
    ("gates", "result", "expected"),
    [
        (VerifySection(max_drop=3), verified(), None),
        (VerifySection(max_drop=1), verified(), AccuracyGateFailed),
        (VerifySection(max_drop=0), verified(sparse=0.93), None),
        (VerifySection(max_drop=0), verified(dense=None), None),
        (VerifySection(max_drop=3, min_speedup=1.2), verified(latency=TIMED), None),
        (VerifySection(max_drop=3, min_speedup=1.3), verified(latency=TIMED), LatencyGateFailed),
        (VerifySection(max_drop=3, min_speedup=1.2), verified(latency=THROTTLED), LatencyGateFailed),
        (VerifySection(max_drop=3, min_speedup=1.3), verified(), EnvironmentLacks),
        (
            VerifySection(max_drop=3, min_speedup=1),
            verified(latency={"tensorrt": {"not_measured": "no GPU"}}),
            EnvironmentLacks,
        ),
        (VerifySection(max_drop=1, min_speedup=1.3), verified(latency=TIMED), AccuracyGateFailed),
    ],
)
def test_the_refusal(gates: VerifySection, result: dict[str, Any], expected: type[Exception] | None) -> None:
    refused = refusal(gates, result)
    assert refused is None if expected is None else isinstance(refused, expected)


def test_a_refusal_has_the_numbers_and_a_way_out() -> None:
    said = str(refusal(VerifySection(max_drop=1), verified()))
    assert all(part in said for part in ("2.00 points", "90.00%", "92.00%", "allowed: 1", "verify.max_drop"))


def test_the_worst_precision_counts() -> None:
    measured = {"scores": {"dense": 0.92, "onnx fp32": 0.91, "onnx fp16": 0.5}, "latency": {}}
    assert "onnx fp16: 50.00% against 92.00%" in str(refusal(VerifySection(max_drop=3), measured))
