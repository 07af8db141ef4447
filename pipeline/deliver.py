"""The stages that make and prove what is deployed: export, build, verify."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tnm_pipeline.engines import EnvironmentLacks, Session, load
from tnm_pipeline.engines.artifact import read_manifest, sha256_of, write_manifest
from tnm_pipeline.engines.manifest import PRECISIONS
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.half import to_fp16
from tnm_pipeline.export.latency import LatencyTable, measure
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.sparsity import SparsityReport, inspect_onnx
from tnm_pipeline.export.tensorrt import build_plan
from tnm_pipeline.export.verify import answer, check, compare, verify_onnx
from tnm_pipeline.pipeline.errors import Stopped
from tnm_pipeline.pipeline.learn import data_of, model_from
from tnm_pipeline.pipeline.stages import Context
from tnm_pipeline.training.checkpoint import Checkpoint
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.tasks import Classification

_INPUT = "input"  # the name of the exported graph's input
_BATCH = 256  # samples that torch answers at once
_SESSIONS = 3  # of each twin while it is timed


def export(context: Context) -> dict[str, Any]:
    """Write the ONNX files, fp32 and fp16, of the sparse model, and fp32 of its dense twin if there is one."""
    config = context.config
    data = data_of(config)
    if not isinstance(data.task, Classification):
        raise ExportRejected(
            f"the data are scored by {data.task.metric}, and only classifiers can be exported and verified so far: the "
            "checkpoints of train and convert are whole, and their results say how they score"
        )
    sample, _ = data.test[:2]
    files = []
    for label, name in (("sparse", "model"), ("dense", "dense")):
        if label not in context.inputs:
            continue
        model, checkpoint = model_from(config, context.inputs[label])
        path = context.folder / f"{name}.fp32.onnx"
        export_onnx(model, sample, path, opset=config.export.opset, input_name=_INPUT)
        files.append(_describe(path, "fp32", checkpoint))
        if label == "sparse" and config.export.fp16:
            half = context.folder / f"{name}.fp16.onnx"
            to_fp16(path, half)
            files.append(_describe(half, "fp16", checkpoint))
        context.progress(len(files), len(context.inputs) + config.export.fp16)
    return {"files": files}


def build(context: Context) -> dict[str, Any]:
    """Build the plan with sparse weights allowed, and its twin from the same file with the flag off."""
    trt = context.config.trt
    onnx_path = context.inputs["onnx"]
    summary = read_manifest(onnx_path).sparsity
    plans = []

    def report_phase(_: str, done: int, total: int) -> None:
        context.progress(done, total)
        if context.should_stop():
            raise Stopped("stopped while building; the same command builds again")

    for sparse, suffix in ((True, ".plan"), (False, ".dense.plan")):
        path = context.folder / f"model.{trt.precision}{suffix}"
        report = build_plan(
            onnx_path,
            path,
            sparse=sparse,
            precision=trt.precision,
            sparsity=summary,
            backend=trt.backend,
            batch=trt.batch,
            compute_capabilities=trt.compute_capabilities,
            on_progress=report_phase,
        )
        manifest = report.manifest
        plans.append(
            {
                "file": path.name,
                "sparse_weights_flag": sparse,
                "bytes": manifest.bytes,
                "sha256": manifest.sha256,
                "backend": manifest.backend,
                "backend_version": manifest.backend_version,
                "compute_capabilities": list(manifest.compute_capabilities),
                "eligible_layers": report.eligible_layers,
                "picked_layers": report.picked_layers,
            }
        )
    return {"plans": plans, "identical": plans[0]["sha256"] == plans[1]["sha256"]}


def verify(context: Context) -> dict[str, Any]:
    """Recount the zeros, compare ONNX with torch, score both, load the plan, time the twins."""
    config = context.config
    inputs, targets = (tensor.numpy() for tensor in data_of(config).test[:])
    model, checkpoint = model_from(config, context.inputs["sparse"])
    reference = _predict(model, inputs)
    parity, accuracy = {}, {"torch": _accuracy(reference, targets)}
    for precision in PRECISIONS:
        if precision in context.inputs:
            path = context.inputs[precision]
            _recount(path, checkpoint)
            answers, measured = verify_onnx(reference, path, inputs, precision)
            parity[precision] = asdict(measured)
            accuracy[f"onnx {precision}"] = _accuracy(answers, targets)
    if "dense onnx" in context.inputs:
        accuracy["dense"] = _accuracy(answer(context.inputs["dense onnx"], inputs), targets)
    plan = _load_plan(context, inputs, reference) if "plan" in context.inputs else None
    latency = _latency(context, inputs)
    return {"parity": parity, "accuracy": accuracy, "plan": plan, "latency": latency, "samples": len(targets)}


def _describe(path: Path, precision: str, checkpoint: Checkpoint) -> dict[str, Any]:
    report = _recount(path, checkpoint)
    write_manifest(path, onnx_manifest(path, precision=precision, sparsity=report.summary()))
    facts = {"file": path.name, "precision": precision, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return facts | {"sparsity": report.to_dict()}


def _recount(path: Path, checkpoint: Checkpoint) -> SparsityReport:
    """Count violations of the promised patterns in an ONNX file, by code that the solvers do not share.

    Raises:
        ExportRejected: a group breaks its pattern, or a sparse layer is not in the file.
    """
    patterns = {name: Pattern.parse(text) for name, text in checkpoint.record.get("layers", {}).items()}
    report = inspect_onnx(path, patterns)
    found = {layer.name: layer for layer in report.layers}
    for name, pattern in patterns.items():
        layer = found.get(name)
        if layer is None or not layer.holds:
            raise ExportRejected(f"{path.name}: layer {name} should hold {pattern}, but: {layer or 'it is not there'}")
    return report


@torch.no_grad()
def _predict(model: nn.Module, inputs: NDArray[Any]) -> NDArray[Any]:
    parts = torch.split(torch.from_numpy(inputs), _BATCH)
    outputs: NDArray[Any] = torch.cat([model(part) for part in parts]).numpy()
    return outputs


def _accuracy(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float((outputs.argmax(1) == targets).mean())


def _load_plan(context: Context, inputs: NDArray[Any], expected: NDArray[Any]) -> dict[str, Any]:
    """Load the plan as production would: by TensorRT where a GPU is, by its ONNX file where none is."""
    with load(context.inputs["plan"], fallback="onnxruntime") as session:
        batch = context.config.trt.batch[1]
        inputs, expected = (np.resize(array, (batch, *array.shape[1:])) for array in (inputs, expected))
        parity = compare(expected, session.run({_INPUT: inputs})[session.outputs[0].name])
        check(parity, session.manifest.precision)
        return {"backend": session.backend, "fallback_reason": session.fallback_reason, "parity": asdict(parity)}


def _latency(context: Context, inputs: NDArray[Any]) -> dict[str, Any]:
    """Time the sparse model against its dense twin, interleaved, on every runtime that works here."""
    settings = context.config.verify
    batch = np.resize(inputs, (settings.latency_batch, *inputs.shape[1:]))
    tables: dict[str, Any] = {}
    for runtime, (sparse, dense) in {
        "onnxruntime": ("fp32", "dense onnx"),
        "tensorrt": ("plan", "dense plan"),
    }.items():
        if sparse not in context.inputs or dense not in context.inputs:
            continue
        try:
            table = _time_twins(context.inputs[sparse], context.inputs[dense], batch, settings.latency_rounds)
        except EnvironmentLacks as error:
            tables[runtime] = {"not_measured": str(error)}
        else:
            backend = read_manifest(context.inputs[sparse]).backend
            setting = {"backend": backend, "batch": settings.latency_batch, "sessions": _SESSIONS}
            tables[runtime] = table.to_dict() | setting
    return tables


def _time_twins(sparse: Path, dense: Path, batch: NDArray[Any], rounds: int) -> LatencyTable:
    """Time two artifacts against each other, each in several sessions that take turns.

    After a call, the threads of an ONNX Runtime session spin for a while, on cores that the next call needs. Between
    two sessions that favours one by chance, by more than sparsity could; with several, both twins suffer alike.
    """
    with ExitStack() as stack:
        turns = {
            name: itertools.cycle([stack.enter_context(load(path)) for _ in range(_SESSIONS)])
            for name, path in (("dense", dense), ("sparse", sparse))
        }
        calls = {name: _call(sessions, batch) for name, sessions in turns.items()}
        return measure(calls, repeats=rounds, warmup=max(10, rounds // 10), baseline="dense")


def _call(sessions: Iterator[Session], batch: NDArray[Any]) -> Callable[[], object]:
    return lambda: next(sessions).run({_INPUT: batch})
