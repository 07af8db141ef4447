"""Whether a verified model is good enough: decided after measuring, so that a refusal loses no measurement."""

from typing import Any

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.export.errors import AccuracyGateFailed
from tnm_pipeline.pipeline.errors import LatencyGateFailed
from tnm_pipeline.pipeline.metrics import metric_of
from tnm_pipeline.pipeline.sections import VerifySection

_CLAIMED = ("faster", "no-difference", "dense-faster")  # of a measurement that nothing disturbed


def refusal(gates: VerifySection, verified: dict[str, Any]) -> Exception | None:
    """Compare the result of stage `verify` with what the configuration demands.

    Args:
        gates: `max_drop` in hundredths of the score, `min_speedup` of the plan over its dense twin.
        verified: the stage's result.

    Returns:
        `AccuracyGateFailed`: too far below dense. `LatencyGateFailed`: the sparse plan gains too little.
        `EnvironmentLacks`: a speed-up is demanded and none could be measured here. None: good enough.
    """
    scores, metric = verified["scores"], metric_of([verified])
    if "dense" in scores:
        worst = min((name for name in scores if name.startswith("onnx ")), key=lambda name: scores[name])
        drop = 100 * (scores["dense"] - scores[worst])
        if drop > gates.max_drop:
            return AccuracyGateFailed(
                f"the sparse model is {drop:.2f} points below dense ({worst}: {metric.text(scores[worst])} against "
                f"{metric.text(scores['dense'])} {metric.name}); allowed: {gates.max_drop:g}. Train longer, keep "
                "sensitive layers dense with sparsity.exclude, or raise verify.max_drop"
            )
    if gates.min_speedup is None:
        return None
    rows = verified["latency"].get("tensorrt", {}).get("rows", [])
    if not rows:
        return EnvironmentLacks("verify.min_speedup needs plans timed on a GPU: run this on a GPU machine, or unset it")
    claim = verified["latency"]["tensorrt"]["claim"]
    if claim["key"] not in _CLAIMED:
        return LatencyGateFailed(f"no speed-up can be claimed: {claim['sentence']}; {claim['remedy']}")
    speedup = 1 / next(row["ratio"] for row in rows if row["name"] == "sparse")
    if speedup < gates.min_speedup:
        return LatencyGateFailed(
            f"the sparse plan is {speedup:.2f} times as fast as its dense twin; verify.min_speedup wants "
            f"{gates.min_speedup:g}. Deploy the dense twin, or lower the gate"
        )
    return None
