"""`inspect` and `verify`: what a file holds, recounted from the file itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tnm_pipeline.engines import (
    ArtifactRejected,
    EnvironmentLacks,
    Manifest,
    RunFailed,
    Session,
    TensorSpec,
    load,
)
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, verify_artifact
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.engines.keys import TrustedKey
from tnm_pipeline.export.counting import TENSORRT_PATTERN
from tnm_pipeline.export.graph import open_onnx
from tnm_pipeline.export.reasons import Finding
from tnm_pipeline.export.sparsity import LayerSparsity, SparsityReport, UnreadWeight, inspect_onnx
from tnm_pipeline.export.verdicts.faults import Faults
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.source import refuse_checkpoint, source_of
from tnm_pipeline.pipeline.tables import new_console, new_table
from tnm_pipeline.training.pattern import Pattern

_SIZES = (1, 8, 32, 64, 224)
_UNREAD = "computed-weight"  # in docs/not-faster.md


@dataclass(frozen=True)
class Row:
    """One layer of a file. Counts are of groups with more than N non-zeros.

    Attributes:
        note: `"eligible"` or why not; of a checkpoint, what it was counted against.
        op: the ONNX operator and
        node: the ONNX node that the weight is used by; empty for a checkpoint.
        key: of why it is not eligible, in docs/not-faster.md; empty for others.
        remedy: what to do about it.
    """

    layer: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    violations: int
    violations_transposed: int
    note: str
    op: str = ""
    node: str = ""
    key: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """What was found in one file.

    Attributes:
        title: the file and what it is.
        rows: layer by layer, as in the file.
        lines: further facts, one sentence each.
        totals: of an ONNX file, what `_totals` counts.
        unread: weights of an ONNX file that could not be counted: name, node, op, why.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    unread: list[UnreadWeight] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; why a weight was not counted has a key as well."""
        return asdict(self) | {"unread": [asdict(weight) | {"key": _UNREAD} for weight in self.unread]}

    def show(self) -> None:
        """Print on stdout."""
        console = new_console()
        console.print(self.title)
        if self.rows:
            operators = any(row.op for row in self.rows)
            named = ("layer", "op") if operators else ("layer",)
            table = new_table(*named, "shape", "pattern", "density", "violations W", "violations W^T", "")
            for row in self.rows:
                name = (row.layer, row.op) if operators else (row.layer,)
                shape = "x".join(str(side) for side in row.shape)
                counts = (str(row.violations), str(row.violations_transposed))
                note = f"{row.note} [{row.key}]" if row.key else row.note
                table.add_row(*name, shape, row.pattern, f"{row.density:.1%}", *counts, note)
            console.print(table)
        for weight in self.unread:
            console.print(f"not counted: {weight.name} ({weight.op}): {weight.why} [{_UNREAD}]")
        for line in self.lines:
            console.print(line)


def inspect_file(path: Path, pattern: str | None) -> Facts:
    """Show what a checkpoint, an ONNX file or a plan holds.

    Args:
        path: `.onnx`, `.plan` with its manifest, `.safetensors` or `.pt`.
        pattern: count against this one instead of the patterns that the file promises.

    Raises:
        ArtifactRejected: missing file, or a plan without a readable manifest.
        ConfigError: a pattern for a plan, whose weights cannot be counted.
        CheckpointError: not a readable checkpoint.
        ExportRejected: not a readable ONNX file.
        PatternError: the pattern makes no sense.
    """
    asked = Pattern.parse(pattern) if pattern else None
    if not path.is_file():
        raise ArtifactRejected(f"{path} is no file: give a checkpoint, an .onnx file or a .plan")
    if path.suffix == ".onnx":
        return _onnx_facts(path, asked)
    if path.suffix == ".plan" or path.name.endswith(".manifest.json") or manifest_path(path).exists():
        manifest = read_manifest(path)
        if asked:
            source = f", {path.parent / manifest.source_onnx}" if manifest.source_onnx else ""
            raise ConfigError(
                f"--pattern {asked}: the weights in the plan {path.name} cannot be counted; give the ONNX file that it "
                f"was built from{source}"
            )
        return _plan_facts(path, manifest)
    return _checkpoint_facts(path, asked)


def _onnx_facts(path: Path, asked: Pattern | None) -> Facts:
    report = inspect_onnx(path, {} if asked else _promised(path), asked)
    totals = _totals(report)
    share = totals["eligible_weights"] / totals["weights"] if totals["weights"] else 0.0
    lines = [
        f"{totals['layers']} layers with {totals['weights']:,} weights; eligible for {TENSORRT_PATTERN}: "
        f"{totals['eligible']} layers with {share:.1%} of the weights",
        f"{totals['violations']:,} groups of W and {totals['violations_transposed']:,} of W^T have too many non-zeros"
        + ("" if any(layer.pattern for layer in report.layers) else f", counted against {TENSORRT_PATTERN}"),
    ]
    lines += [f"promised and not in the file: {', '.join(report.missing)}"] if report.missing else []
    return Facts(f"{path}: ONNX", _rows(path, report), lines, totals, list(report.unread))


def _totals(report: SparsityReport) -> dict[str, int]:
    """Sums over the layers that promise a pattern, or over all if none does; weights and eligible ones over all."""
    promising = [layer for layer in report.layers if layer.pattern] or report.layers
    eligible = [layer for layer in report.layers if layer.eligible]
    return {
        "layers": len(report.layers),
        "weights": sum(layer.weights for layer in report.layers),
        "eligible": len(eligible),
        "eligible_weights": sum(layer.weights for layer in eligible),
        "violations": sum(layer.violations for layer in promising),
        "violations_transposed": sum(layer.violations_transposed for layer in promising),
        "unread": len(report.unread),
    }


def verify_file(
    path: Path, fallback: Literal["error", "onnxruntime"], trusted: Sequence[TrustedKey] | None = None
) -> Facts:
    """Check an artifact as production would: manifest, hash, sparsity recounted, load, run.

    Args:
        path: `.onnx` or `.plan`, with its manifest.
        fallback: `onnxruntime`: where a plan cannot run, its ONNX file answers and a line says why.
        trusted: keys that must have signed what is loaded; None: signatures are not looked at.

    Raises:
        EnvironmentLacks: the plan cannot run here and no fallback was allowed.
        RunFailed: the network answers zeros in none of the sizes that were tried.
        ArtifactRejected: the artifact, its source or a manifest is not what it should be, or a promised pattern is
            broken.
    """
    refuse_checkpoint(path)
    manifest = verify_artifact(path)
    lines = [f"sha256 {manifest.sha256}: as in the manifest"]
    source = path if manifest.backend == "onnxruntime" else source_of(path, manifest)
    verify_artifact(source)
    report = inspect_onnx(source, _promised(source))
    layers = report.layers
    if report.missing:
        raise ArtifactRejected(
            f"{source.name} lacks layers that its manifest promises: {', '.join(report.missing)}; export it again "
            "from its checkpoint"
        )
    for layer in layers:
        if not layer.holds:
            raise ArtifactRejected(
                f"{source.name}: {layer.name} breaks {layer.pattern} in {layer.violations} groups of W and "
                f"{layer.violations_transposed} of W^T; export it again from its checkpoint"
            )
    promised = sum(layer.pattern is not None for layer in layers)
    lines.append(f"0 violating groups in the {promised} layers of {source.name} that promise a pattern")
    with _load(path, fallback, trusted) as session:
        usual = {dim: best for spec in manifest.inputs for dim, (_, best, _) in spec.ranges.items()}
        outputs = _answer(session, usual)
        finite = all(bool(np.isfinite(output).all()) for output in outputs.values())
        lines.append(f"loaded and run by {session.backend}; the outputs are {'finite' if finite else 'NOT finite'}")
        if session.fallback_reason:
            lines.append(f"not by {manifest.backend}: {session.fallback_reason}")
    if not finite:
        raise ArtifactRejected(f"{path.name} gives NaN or Inf for an input of zeros; export it again")
    return Facts(
        f"{path}: {manifest.backend} {manifest.backend_version}, {manifest.precision}",
        _rows(source, report),
        lines,
    )


def _load(path: Path, fallback: Literal["error", "onnxruntime"], trusted: Sequence[TrustedKey] | None) -> Session:
    try:
        return load(path, fallback=fallback, trusted_keys=trusted)
    except EnvironmentLacks as error:
        error.add_note("on the command line: --fallback onnxruntime")
        raise


def _promised(onnx_path: Path) -> dict[str, Pattern]:
    """The patterns that an ONNX file's manifest promises, by layer; empty without a manifest."""
    if not manifest_path(onnx_path).exists():
        return {}
    promised = read_manifest(onnx_path).sparsity.get("patterns", {})
    assert isinstance(promised, Mapping)
    return {name: Pattern.parse(text) for name, text in promised.items()}


def _rows(path: Path, report: SparsityReport) -> list[Row]:
    faults = Faults(open_onnx(path))
    return [_row(layer, None if layer.eligible else faults.exclusion(layer)) for layer in report.layers]


def _row(layer: LayerSparsity, excluded: Finding | None) -> Row:
    return Row(
        layer=layer.name,
        shape=tuple(layer.shape),
        pattern=layer.pattern or "",
        density=layer.density,
        violations=layer.violations,
        violations_transposed=layer.violations_transposed,
        note="eligible" if excluded is None else excluded.message,
        op=layer.op,
        node=layer.node,
        key="" if excluded is None else excluded.key,
        remedy="" if excluded is None else excluded.remedy,
    )


def _plan_facts(path: Path, manifest: Manifest) -> Facts:
    capabilities = ", ".join(manifest.compute_capabilities)
    fallback = "" if probe().gpus else " --fallback onnxruntime"
    lines = [
        f"built by {manifest.backend} {manifest.backend_version} for compute capability {capabilities}",
        f"sparse weights flag: {'on' if manifest.sparse_weights_flag else 'off'}",
        f"source: {manifest.source_onnx}",
        f"inputs: {', '.join(map(_tensor, manifest.inputs))}; outputs: {', '.join(map(_tensor, manifest.outputs))}",
        f"sparsity of its source: {_stated(manifest.sparsity)}",
        f"check it with: tnm-pipeline verify {path}{fallback}",
    ]
    return Facts(f"{path}: {manifest.backend} plan, {manifest.precision}, {manifest.bytes:,} bytes", [], lines)


def _stated(sparsity: Mapping[str, object]) -> str:
    """What a manifest says of the layers, in words: how many are eligible, how many promise which pattern."""
    words = []
    if "eligible" in sparsity and "layers" in sparsity:
        words.append(f"{sparsity['eligible']} of {sparsity['layers']} layers eligible")
    patterns = sparsity.get("patterns")
    if isinstance(patterns, Mapping):
        counts = sorted(Counter(map(str, patterns.values())).items())
        words += [f"{count} {'promises' if count == 1 else 'promise'} {pattern}" for pattern, count in counts]
    return ", ".join(words) or "not stated"


def _checkpoint_facts(path: Path, asked: Pattern | None) -> Facts:
    from tnm_pipeline.pipeline.resolve import check_checkpoint
    from tnm_pipeline.pipeline.what_if import prunable_weights
    from tnm_pipeline.training.checkpoint import read_checkpoint
    from tnm_pipeline.training.masks import count_violations

    check_checkpoint(path)
    checkpoint = read_checkpoint(path)
    promised = {name: Pattern.parse(text) for name, text in checkpoint.record.get("layers", {}).items()}
    rows = []
    for layer, tensor in prunable_weights(checkpoint):
        pattern = asked or promised.get(layer)
        counted = count_violations(tensor, pattern or Pattern(2, 4, transposable=True))
        rows.append(
            Row(
                layer=layer,
                shape=tuple(tensor.shape),
                pattern=str(pattern or ""),
                density=float((tensor != 0).double().mean()),
                violations=counted.forward,
                violations_transposed=counted.transposed,
                note="" if pattern else "promises no pattern; counted against 2:4",
            )
        )
    record = checkpoint.record
    origin = f"model {record['model']['source']}, stage {record['stage']}" if record else "not written by tnm-pipeline"
    return Facts(f"{path}: checkpoint, {origin}", rows)


def _answer(session: Session, usual: Mapping[str, int]) -> Mapping[str, np.ndarray[Any, Any]]:
    """The outputs for zeros, in the usual sizes of a plan, or in the first of a few sizes that the network takes.

    The first dimension of an input is a batch of 1 unless a plan says otherwise; many networks take no image of 1 x 1.
    """
    dims = {dim for spec in session.inputs for dim in spec.shape if isinstance(dim, str)}
    first = {spec.shape[0] for spec in session.inputs if spec.shape}
    if dims <= {*usual, *first}:
        return session.run(_zeros(session.inputs, usual, 1))
    failures: list[RunFailed] = []
    for size in _SIZES:
        try:
            return session.run(_zeros(session.inputs, usual, size))
        except RunFailed as error:
            failures.append(error)
    named, tried = ", ".join(sorted(dims - {*usual, *first})), ", ".join(map(str, _SIZES))
    raise RunFailed(
        f"{failures[-1]}. {named} was each of {tried}: run it with "
        "sizes that fit together, by `tnm-pipeline bench --size NAME=N`"
    ) from failures[-1]


def _zeros(specs: Sequence[TensorSpec], usual: Mapping[str, int], size: int) -> dict[str, np.ndarray[Any, Any]]:
    """One input each, dimensions that are not usual being of one size, but for the first of an input, which is 1."""
    sizes = {str(spec.shape[0]): 1 for spec in specs if spec.shape} | dict(usual)
    return {
        spec.name: np.zeros([dim if isinstance(dim, int) else sizes.get(dim, size) for dim in spec.shape], spec.dtype)
        for spec in specs
    }


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {'x'.join(str(side) for side in spec.shape)}"
