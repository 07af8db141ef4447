"""The stages that make what is deployed: export, build."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from tnm_pipeline.engines.artifact import manifest_path, read_manifest, sha256_of, write_manifest
from tnm_pipeline.engines.manifest import Ranges
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.building.progress import BuildProgress
from tnm_pipeline.export.errors import AccuracyGateFailed, ExportRejected
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import OPSET_OF, Half, retype
from tnm_pipeline.export.signature import BATCH, call, named_outputs
from tnm_pipeline.export.sparsity import SparsityReport, inspect_onnx
from tnm_pipeline.export.tensorrt import BuildOptions, BuildReport, build_plan
from tnm_pipeline.export.verdict import Verdict, verdict
from tnm_pipeline.export.verdicts.comparison import VERDICT
from tnm_pipeline.export.verdicts.sightings import PlanFacts
from tnm_pipeline.export.verify import Tally, check
from tnm_pipeline.pipeline.calls import emulates, open_graph, real_tokens, sample_calls
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.errors import ConfigError, Stopped
from tnm_pipeline.pipeline.learn import model_from
from tnm_pipeline.pipeline.stages import Context
from tnm_pipeline.pipeline.twins import deploy
from tnm_pipeline.training.checkpoint import Checkpoint
from tnm_pipeline.training.pattern import Pattern


def export(context: Context) -> dict[str, Any]:
    """Write the ONNX files of the sparse model in every precision, and fp32 of its dense twin if there is one."""
    config = context.config
    files: list[dict[str, Any]] = []
    ranges: Ranges = {}
    for label, name in (("sparse", "model"), ("dense", "dense")):
        if label not in context.inputs:
            continue
        model, checkpoint = model_from(config, context.inputs[label])
        calls = sample_calls(config, model)
        fp32 = context.folder / f"{name}.fp32.onnx"
        ranges = export_onnx(model, calls, fp32, opset=config.export.opset).ranges
        for precision in config.export.precisions if label == "sparse" else ("fp32",):
            path = fp32.with_name(f"{name}.{precision}.onnx")
            if precision != "fp32":
                _write_half(config, model, calls, fp32, path, precision)
            origin = {"checkpoint_sha256": sha256_of(context.inputs[label]), **_settings_hash(context)}
            facts = _describe(path, precision, checkpoint, origin)
            files.append(facts | {"parity": _gate(model, calls, path, precision)})
            context.progress(len(files), len(config.export.precisions) + ("dense" in context.inputs))
    return {"files": files, "ranges": ranges}


def _write_half(
    config: Config, model: nn.Module, calls: list[dict[str, Tensor]], fp32: Path, path: Path, precision: Half
) -> None:
    """A half precision is the fp32 graph with other types: of the same file, or of a newer opset that knows them."""
    if OPSET_OF[precision] <= config.export.opset:
        retype(fp32, path, precision, keep=config.export.keep_fp32)
        return
    with TemporaryDirectory(dir=path.parent) as drafts:
        newer = Path(drafts, fp32.name)
        export_onnx(model, calls, newer, opset=OPSET_OF[precision])
        retype(newer, path, precision, keep=config.export.keep_fp32)


def _gate(model: nn.Module, calls: list[dict[str, Tensor]], path: Path, precision: str) -> dict[str, Any]:
    """Compare a file with torch on the sample calls; one that differs too much is set aside.

    Raises:
        AccuracyGateFailed: It does.
    """
    tally = Tally()
    with open_graph(path, precision) as session:
        for inputs in calls:
            reference = {name: tensor.numpy() for name, tensor in named_outputs(call(model, inputs)).items()}
            answers = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
            tally.add(reference, answers, real_tokens(inputs))
    parity = tally.parity()
    try:
        check(parity, precision, path.name)
    except AccuracyGateFailed as error:
        rejected = path.with_name(path.name + ".rejected")
        path.replace(rejected)
        manifest_path(path).unlink()
        raise AccuracyGateFailed(f"{error}. The file was kept as {rejected}") from None
    return asdict(parity) | {"emulated": emulates(precision)}


def build(context: Context) -> dict[str, Any]:
    """Build the plan with sparse weights allowed, and its twin from the same file with the flag off."""
    trt = context.config.trt
    onnx_path = context.inputs["onnx"]
    source = read_manifest(onnx_path)
    summary = source.sparsity
    patterns = {layer: Pattern.parse(str(pattern)) for layer, pattern in _patterns(summary).items()}
    counted = inspect_onnx(onnx_path, patterns)
    ranges = json.loads(context.inputs["export result"].read_text(encoding="utf-8"))["ranges"]
    _check_profiles(trt.profiles, ranges)
    # Down to 1, whatever the samples' smallest is: that costs a plan nothing, and production sends short inputs.
    spans = {dim: (1, usual, largest) for dim, (_, usual, largest) in ranges.items()}
    profiles = [{"batch": trt.batch, **spans, **profile} for profile in trt.profiles or ({},)]
    options = trt.model_dump(include={field.name for field in fields(BuildOptions)})
    plans: dict[str, Path] = {}
    built: list[dict[str, Any]] = []
    verdicts: dict[str, Verdict] = {}

    def report_phase(progress: BuildProgress) -> None:
        context.progress(progress.done, progress.total)
        if context.should_stop():
            raise Stopped("stopped while building; the same command builds again")

    for name, suffix in (("sparse", ".plan"), ("dense", ".dense.plan")):
        plans[name] = context.folder / f"model.{trt.precision}{suffix}"
        report = build_plan(
            onnx_path,
            plans[name],
            sparse=name == "sparse",
            precision=trt.precision,
            sparsity=summary,
            backend=trt.backend,
            profiles=profiles,
            compute_capabilities=trt.compute_capabilities,
            keep_fp32=context.config.export.keep_fp32,
            options=BuildOptions(**options),
            provenance={"source": source.provenance, **_settings_hash(context)},
            on_progress=report_phase,
        )
        built.append(_facts(plans[name], report))
        verdicts[name] = verdict(onnx_path, counted, PlanFacts.of(report))
        found = {**summary, VERDICT: verdicts[name].for_manifest()}
        write_manifest(plans[name], replace(report.manifest, sparsity=found))
    return {
        "plans": built,
        "identical": built[0]["sha256"] == built[1]["sha256"],
        "engine": deploy(context.config, plans),
        "verdict": verdicts["sparse"].to_dict(),
    }


def _check_profiles(profiles: Sequence[Mapping[str, object]], ranges: Ranges) -> None:
    known = [BATCH, *ranges]
    for name in (name for profile in profiles for name in profile if name not in known):
        close = get_close_matches(name, known, n=1)
        raise ConfigError(
            f"trt.profiles names {name!r}, and the dimensions that vary are {', '.join(known)}"
            + (f": did you mean {close[0]}?" if close else ": take it out, or give samples in which it varies")
        )


def _facts(path: Path, report: BuildReport) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "file": path.name,
        "sparse_weights_flag": manifest.sparse_weights_flag,
        "bytes": manifest.bytes,
        "sha256": manifest.sha256,
        "backend": manifest.backend,
        "backend_version": manifest.backend_version,
        "compute_capabilities": list(manifest.compute_capabilities),
        "profiles": [dict(profile) for profile in manifest.profiles],
        "eligible_layers": report.eligible_layers,
        "picked_layers": report.picked_layers,
        "seconds": report.seconds,
        "notes": list(report.notes),
    }


def _patterns(summary: Mapping[str, object]) -> Mapping[str, object]:
    """Of a manifest's sparsity summary: layer -> the pattern it promises."""
    patterns = summary["patterns"]
    assert isinstance(patterns, Mapping)
    return patterns


def _settings_hash(context: Context) -> dict[str, str]:
    """What tells whether two artifacts were made with the same settings."""
    text = json.dumps(context.settings, sort_keys=True)
    return {"settings_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _describe(path: Path, precision: str, checkpoint: Checkpoint, origin: Mapping[str, object]) -> dict[str, Any]:
    report = recount(path, checkpoint)
    write_manifest(path, onnx_manifest(path, precision=precision, sparsity=report.summary(), provenance=origin))
    facts = {"file": path.name, "precision": precision, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return facts | {"sparsity": report.to_dict()}


def recount(path: Path, checkpoint: Checkpoint) -> SparsityReport:
    """Count violations of the promised patterns in an ONNX file, by code that the solvers do not share.

    Raises:
        ExportRejected: a group breaks its pattern, or a sparse layer is not in the file.
    """
    patterns = {name: Pattern.parse(text) for name, text in checkpoint.record.get("layers", {}).items()}
    report = inspect_onnx(path, patterns)
    found = {layer.name: layer for layer in report.layers}
    for name, pattern in patterns.items():
        layer = found.get(name)
        if layer is None:
            unread = next((weight.why for weight in report.unread if weight.name == name), "no node uses its weight")
            raise ExportRejected(f"{path.name}: layer {name} should hold {pattern} and cannot be counted: {unread}")
        if not layer.holds:
            raise ExportRejected(
                f"{path.name}: layer {name} should hold {pattern}, and {layer.violations} groups of W and "
                f"{layer.violations_transposed} of W^T break it; make the checkpoint again"
            )
    return report
