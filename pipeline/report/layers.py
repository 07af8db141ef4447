"""The per-layer table: what training or conversion did, what the ONNX file holds, what the builder said."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnm_pipeline.training.pattern import Pattern

NOT_OBSERVED = "not observed"


@dataclass(frozen=True)
class LayerRow:
    """One layer. What nobody measured is None.

    Attributes:
        name: of the torch layer, or what a foreign ONNX file calls its weight.
        node: the ONNX node, where two of them share one weight; empty otherwise.
        type: `Linear`, `Conv2d`, or the ONNX operator where no torch stage spoke of the layer.
        shape: of the weight.
        pattern: text form; None when the layer stayed dense.
        kept_magnitude: sum of kept abs(w) over sum of abs(w), in [0, 1].
        violations: groups of W that break the pattern; None for a dense layer.
        violations_transposed: groups of W^T that break it; None for a dense layer, or where nobody counted.
        predicted_error: relative output error that the plan of a conversion foretold: of fitted weights, on the dense
            model's inputs of batches that they were not fitted to; None where nothing was predicted.
        error_masked: relative output error of the masked weight inside the converted model; conversions only.
        error_own: relative output error of the weight that the conversion solved for, on the dense model's inputs.
        error: the same inside the converted model, where the layers before it err too.
        eligible: the ONNX weight is 2:4 along the axis that TensorRT reads; None without an ONNX file.
        flag_set: the plan was built with sparse weights allowed; None without a plan.
        picked: in words; empty where the question does not arise.
        why_not: why the layer is dense, not eligible or not picked; empty if nothing of it.
        key: of that reason in docs/not-faster.md; empty for one that is not there.
        remedy: what to do about it; empty where nothing is.
    """

    name: str
    node: str
    type: str
    shape: tuple[int, ...]
    pattern: str | None
    kept_magnitude: float | None
    violations: int | None
    violations_transposed: int | None
    predicted_error: float | None
    error_masked: float | None
    error_own: float | None
    error: float | None
    eligible: bool | None
    flag_set: bool | None
    picked: str
    why_not: str
    key: str = ""
    remedy: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the pattern holds in every direction that it promises; None if dense or not counted."""
        if self.pattern is None or self.violations is None:
            return None
        if not Pattern.parse(self.pattern).transposable:
            return self.violations == 0
        if self.violations_transposed is None:
            return None if self.violations == 0 else False
        return self.violations == 0 and self.violations_transposed == 0


def layer_rows(
    route: Mapping[str, Any],
    pattern: str,
    onnx: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
    verdict: Mapping[str, Any] | None,
) -> tuple[LayerRow, ...]:
    """Merge the witnesses by layer name, and by node where they speak of the graph.

    Args:
        route: the `result.json` of the stage that made the exported checkpoint; empty when it was given.
        pattern: that the run asked for, where a row does not repeat it.
        onnx: the `sparsity` of the exported file that the plan was built from; None before export.
        plan: the entry of the sparse plan in the build's result; None without one.
        verdict: the build's on each layer, as `tnm_pipeline.export.verdict` gives it; None without a plan.

    Returns:
        In the order of the ONNX graph, then whatever it does not hold. Counts in the ONNX file win over those of
        the stage that made the weights: they are made on what is deployed, by code that the solvers do not share.
    """
    predicted = _predicted(route.get("plan", {}))
    trained = {
        name: {"pattern": pattern, "predicted_error": predicted.get(row["name"]), **row, "name": name}
        for row in route.get("layers", [])
        for name in (row["name"], *row.get("tied", ()))
    }
    for name, reason in route.get("skipped", {}).items():
        trained[name] = {"name": name, **trained.get(name, {}), "pattern": None, "skipped": reason}
    counted: Sequence[Mapping[str, Any]] = onnx["per_layer"] if onnx else ()
    told = {(row["name"], row["node"]): row for row in verdict["layers"]} if verdict else {}
    names = [row["name"] for row in counted]
    rows = [
        _row(
            trained.get(row["name"], {}),
            row,
            plan,
            told.get((row["name"], row["node"]), {}),
            shared=names.count(row["name"]) > 1,
        )
        for row in counted
    ]
    absent = (row for name, row in trained.items() if name not in names)
    return (*rows, *_absent(absent, exported=onnx is not None))


def _row(
    torch: Mapping[str, Any],
    onnx: Mapping[str, Any],
    plan: Mapping[str, Any] | None,
    told: Mapping[str, Any],
    *,
    shared: bool,
) -> LayerRow:
    sparse = onnx["pattern"] is not None
    finding = told["why"][0] if told and told["why"] and not torch.get("skipped") else None
    return LayerRow(
        name=onnx["name"],
        node=onnx["node"] if shared else "",
        type=torch.get("type", onnx["op"]),
        shape=tuple(torch.get("shape", onnx["shape"])),
        pattern=onnx["pattern"],
        kept_magnitude=torch.get("kept_magnitude"),
        violations=onnx["violations"] if sparse else None,
        violations_transposed=onnx["violations_transposed"] if sparse else None,
        predicted_error=torch.get("predicted_error"),
        error_masked=torch.get("error_masked"),
        error_own=torch.get("error_own"),
        error=torch.get("error"),
        eligible=onnx["eligible"],
        flag_set=plan["sparse_weights_flag"] if plan else None,
        picked=_picked(told),
        why_not=finding["message"] if finding else torch.get("skipped") or onnx["why"],
        key=finding["key"] if finding else "",
        remedy=finding["remedy"] if finding else "",
    )


def _absent(rows: Iterator[Mapping[str, Any]], *, exported: bool) -> Iterator[LayerRow]:
    for row in rows:
        yield LayerRow(
            name=row["name"],
            node="",
            type=row.get("type", ""),
            shape=tuple(row.get("shape", ())),
            pattern=row["pattern"],
            kept_magnitude=row.get("kept_magnitude"),
            violations=row.get("violations"),
            violations_transposed=row.get("violations_transposed"),
            predicted_error=row.get("predicted_error"),
            error_masked=row.get("error_masked"),
            error_own=row.get("error_own"),
            error=row.get("error"),
            eligible=None,
            flag_set=None,
            picked="",
            why_not=row.get("skipped") or ("not in the ONNX file" if exported else ""),
        )


def _predicted(plan: Mapping[str, Any]) -> dict[str, float | None]:
    """Layer -> error that the plan of a conversion foretold for what it took."""
    return {
        layer["name"]: candidate["predicted_error"]
        for layer in plan.get("layers", [])
        for candidate in layer["candidates"]
        if candidate["rejected"] is None
    }


def _picked(told: Mapping[str, Any]) -> str:
    if not told or not told["eligible"]:
        return ""
    return NOT_OBSERVED if told["picked"] is None else "yes" if told["picked"] else "no"
