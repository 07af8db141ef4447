"""Whether a verified model is good enough: decided after measuring, so that a refusal loses no measurement."""

from typing import Any

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.export.errors import AccuracyGateFailed
from tnm_pipeline.pipeline.config import VerifySection
from tnm_pipeline.pipeline.errors import LatencyGateFailed


def refusal(gates: VerifySection, verified: dict[str, Any]) -> Exception | None:
    """Compare the result of stage `verify` with what the configuration demands.

    Args:
        gates: `max_drop` in points of accuracy, `min_speedup` of the plan over its dense twin.
        verified: the stage's result.

    Returns:
        `AccuracyGateFailed`: too far below dense. `LatencyGateFailed`: the sparse plan gains too little.
        `EnvironmentLacks`: a speed-up is demanded and none could be measured here. None: good enough.
    """
    accuracy = verified["accuracy"]
    if "dense" in accuracy:
        drop = 100 * (accuracy["dense"] - accuracy["onnx fp32"])
        if drop > gates.max_drop:
            return AccuracyGateFailed(
                f"the sparse model is {drop:.2f} points below dense ({accuracy['onnx fp32']:.2%} against "
                f"{accuracy['dense']:.2%}); allowed: {gates.max_drop:g}. Train longer, keep sensitive layers dense "
                "with sparsity.exclude, or raise verify.max_drop"
            )
    if gates.min_speedup is None:
        return None
    rows = verified["latency"].get("tensorrt", {}).get("rows", [])
    if not rows:
        return EnvironmentLacks("verify.min_speedup needs plans timed on a GPU: run this on a GPU machine, or unset it")
    speedup = 1 / next(row["ratio"] for row in rows if row["name"] == "sparse")
    if speedup < gates.min_speedup:
        return LatencyGateFailed(
            f"the sparse plan is {speedup:.2f} times as fast as its dense twin; verify.min_speedup wants "
            f"{gates.min_speedup:g}. Deploy the dense twin, or lower the gate"
        )
    return None
