"""What became of every sparse weight: pattern held, eligible, flag set, picked, and why not. Only what was observed."""

from dataclasses import asdict, dataclass
from pathlib import Path

from tnm_pipeline.export.graph import open_onnx
from tnm_pipeline.export.reasons import TENSOR_CORES, Finding, finding
from tnm_pipeline.export.sparsity import LayerSparsity, SparsityReport, UnreadWeight
from tnm_pipeline.export.verdicts.builder_names import BuilderNames, node_name
from tnm_pipeline.export.verdicts.faults import Faults
from tnm_pipeline.export.verdicts.sightings import PlanFacts, Sighting, Sightings


@dataclass(frozen=True)
class LayerVerdict:
    """One weight.

    Attributes:
        name: As in `LayerSparsity`, like the next four.
        node: The ONNX node.
        op: Its operator.
        shape: The weight's; empty for one that could not be read.
        pattern: What it should hold; None where nothing was asked for, and then 2:4 is meant below.
        holds: Whether the pattern holds along the input features; None where it could not be read.
        holds_transposed: Whether it holds along the output features too.
        eligible: Whether the weight is 2:4 along the input features in whole groups.
        flag_set: Whether the builder was allowed sparse tactics; None without a plan.
        picked: Whether it chose one; None where that was not observed.
        why: Why it is not sparse in the plan, as observed; empty where it is.
        risks: Documented circumstances that favour dense tactics, for eligible weights that were not seen picked.
            None of them was observed to be the cause.
        seen_as: The builder's names that were matched to it.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    pattern: str | None
    holds: bool | None
    holds_transposed: bool | None
    eligible: bool
    flag_set: bool | None
    picked: bool | None
    why: tuple[Finding, ...]
    risks: tuple[Finding, ...] = ()
    seen_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """All weights of a file, and what one plan made of them.

    Attributes:
        layers: In graph order; weights that could not be read come last.
        unmapped: The builder's names of sparse layers that no weight was found for.
        summary: One sentence.
    """

    layers: tuple[LayerVerdict, ...]
    unmapped: tuple[str, ...]
    summary: str

    def to_dict(self) -> dict[str, object]:
        """JSON-able data."""
        return asdict(self)

    def for_manifest(self) -> dict[str, object]:
        """What goes into a manifest: of each layer what was promised and observed, and the keys of the reasons."""
        layers = [
            {
                "layer": layer.name,
                "pattern": layer.pattern,
                "holds": layer.holds,
                "eligible": layer.eligible,
                "picked": layer.picked,
                "why": [reason.key for reason in layer.why],
            }
            for layer in self.layers
        ]
        return {"summary": self.summary, "layers": layers}


def verdict(onnx_path: Path, report: SparsityReport, plan: PlanFacts | None = None) -> Verdict:
    """Say of every weight whether it is sparse in a plan, and why not.

    Args:
        onnx_path: The file that the plan was built from.
        report: `inspect_onnx` of the same file.
        plan: What is known about the plan; None without one.

    Returns:
        The verdict. What was not observed is None, with the reason why.

    Raises:
        ExportRejected: The file is missing or malformed.
    """
    faults = Faults(open_onnx(onnx_path))
    sightings = None
    if plan is not None:
        weighted = {node_name(layer.node, layer.output) for layer in report.layers}
        sightings = Sightings(plan, BuilderNames(faults.names), weighted)
    counted = [_counted(layer, faults, plan, sightings) for layer in report.layers]
    layers = (*counted, *(_unread(weight, plan) for weight in report.unread))
    return Verdict(layers, () if sightings is None else sightings.unmapped, summarise(layers, plan))


def summarise(layers: tuple[LayerVerdict, ...], plan: PlanFacts | None) -> str:
    """One sentence about a whole engine.

    Args:
        layers: Its weights.
        plan: What is known about it; None without a plan.

    Returns:
        How many layers are eligible, whether the flag is set, and how many were observed as picked, or why none was.
    """
    eligible = [layer for layer in layers if layer.eligible]
    start = f"{len(eligible)} of {len(layers)} layers eligible"
    if plan is None:
        return f"{start}; no plan was built"
    if not plan.manifest.sparse_weights_flag:
        return f"{start}, flag not set, so the builder was allowed no sparse tactic"
    if plan.picked_layers is not None:
        return f"{start}, flag set, {plan.picked_layers} picked by the builder"
    picked = sum(layer.picked is True for layer in layers)
    unknown = sum(layer.picked is None for layer in eligible)
    why = "the builder did not say" if picked == 0 else f"{unknown} not observed"
    if plan.silent and plan.manifest.gpu is None:
        why = "built without a GPU, so no tactic was chosen here"
    elif plan.silent and plan.manifest.backend == "tensorrt_rtx":
        why = "TensorRT for RTX chooses tactics where the plan is loaded"
    return f"{start}, flag set, {picked} observed as picked" + (f": {why}" if unknown else "")


def _counted(layer: LayerSparsity, faults: Faults, plan: PlanFacts | None, sightings: Sightings | None) -> LayerVerdict:
    seen = None if sightings is None else sightings.of(node_name(layer.node, layer.output))
    picked = None if seen is None else seen.picked
    why = faults.exclusion(layer) if not layer.eligible else _outcome(plan, seen)
    return LayerVerdict(
        name=layer.name,
        node=layer.node,
        op=layer.op,
        shape=tuple(layer.shape),
        pattern=layer.pattern,
        holds=layer.violations == 0,
        holds_transposed=layer.violations_transposed == 0,
        eligible=layer.eligible,
        flag_set=None if plan is None else plan.manifest.sparse_weights_flag,
        picked=picked,
        why=() if why is None else (why,),
        risks=faults.risks(layer) if layer.eligible and picked is not True else (),
        seen_as=() if seen is None else seen.names,
    )


def _unread(weight: UnreadWeight, plan: PlanFacts | None) -> LayerVerdict:
    return LayerVerdict(
        name=weight.name,
        node=weight.node,
        op=weight.op,
        shape=(),
        pattern=None,
        holds=None,
        holds_transposed=None,
        eligible=False,
        flag_set=None if plan is None else plan.manifest.sparse_weights_flag,
        picked=None,
        why=(finding("computed-weight", why=weight.why),),
    )


def _outcome(plan: PlanFacts | None, seen: Sighting | None) -> Finding | None:
    """Why an eligible weight is not sparse in the plan, or is not known to be; None where it is."""
    if plan is None or seen is None:
        return finding("no-plan")
    if not plan.manifest.sparse_weights_flag:
        return finding("flag-off")
    capabilities = plan.manifest.compute_capabilities
    if all(_number(capability) < _number(TENSOR_CORES) for capability in capabilities):
        return finding("gpu-too-old", capabilities=", ".join(capabilities))
    if seen.picked:
        return None
    if seen.eligible is False:
        return finding("builder-disagrees")
    if seen.picked is False:
        return finding("dense-tactic", tactic=seen.tactic or "a dense tactic")
    if plan.silent:
        return finding("rtx-silent" if plan.manifest.backend == "tensorrt_rtx" else "builder-silent")
    if seen.region is not None:
        return finding("fused-region", region=seen.region)
    return finding("builder-silent" if seen.names else "fused-away")


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
