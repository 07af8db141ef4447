"""What a finished engine computes in, as far as its inspector tells."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tnm_pipeline.export.errors import BuildFailed

_NAMES = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}


def check_engine_precision(layers: Sequence[Mapping[str, Any]], precision: str, keep_fp32: Collection[str]) -> None:
    """Refuse an engine with a layer whose weights are stored in another floating type than promised.

    Layers that state no type of weights prove nothing either way: fused regions hide theirs.

    Args:
        layers: From the engine inspector, as in `BuildReport.inspector`.
        precision: What was promised: `"fp32"`, `"fp16"` or `"bf16"`.
        keep_fp32: Names of nodes that may compute in fp32 all the same.

    Raises:
        BuildFailed: Naming the layer.
    """
    for layer in layers:
        weights = layer.get("Weights")
        found = weights.get("Type") if isinstance(weights, Mapping) else None
        if found not in _NAMES.values() or found == _NAMES[precision]:
            continue
        parts = str(layer.get("Name", "")).split(" + ")  # a fused layer joins the names of its nodes
        if not (found == _NAMES["fp32"] and set(parts) & set(keep_fp32)):
            raise BuildFailed(
                f"the builder made layer {layer.get('Name')} with weights of type {found}, and {precision} was "
                "promised: report this to the builder's makers, with the ONNX file; until then build in fp32"
            )
