"""The stage that proves what is deployed: the zeros recounted, outputs compared, scored, loaded, timed."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnm_pipeline.engines import EnvironmentLacks, load
from tnm_pipeline.engines.artifact import read_manifest
from tnm_pipeline.export.latency import claim
from tnm_pipeline.export.reasons import finding
from tnm_pipeline.export.signature import BATCH, call, named_outputs
from tnm_pipeline.export.verify import Tally, check
from tnm_pipeline.pipeline.calls import (
    Answerer,
    Recorder,
    asked,
    emulates,
    open_graph,
    real_tokens,
    resized,
    sample_calls,
)
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.deliver import recount
from tnm_pipeline.pipeline.learn import data_of, model_from
from tnm_pipeline.pipeline.stages import Context
from tnm_pipeline.pipeline.turns import sessions_for, time_in_turns


def verify(context: Context) -> dict[str, Any]:
    """Recount the zeros, compare ONNX with torch, score both, load the plan, time the twins."""
    config = context.config
    model, checkpoint = model_from(config, context.inputs["sparse"])
    graphs: dict[str, Path] = {precision: context.inputs[precision] for precision in config.export.precisions}
    for path in graphs.values():
        recount(path, checkpoint)
    found = _compare(config, model, graphs, context.inputs.get("dense onnx"))
    inputs = sample_calls(config, model)[-1]
    plan = _load_plan(context.inputs["engine"], model, inputs) if "engine" in context.inputs else None
    return {**found, "plan": plan, "latency": _latency(context, inputs)}


@torch.no_grad()
def _compare(config: Config, model: nn.Module, graphs: Mapping[str, Path], dense: Path | None) -> dict[str, Any]:
    """Ask torch and every file the same; how far they are apart, and how each scores where there are labels."""
    predictions: dict[str, list[Tensor]] = {}
    tallies = {precision: Tally() for precision in graphs}
    with ExitStack() as stack:
        recorder = Recorder(model)
        answerers = {
            precision: Answerer(model, stack.enter_context(open_graph(path, precision)))
            for precision, path in graphs.items()
        }
        asking: dict[str, nn.Module] = {"torch": recorder}
        asking |= {f"onnx {precision}": answerer for precision, answerer in answerers.items()}
        if dense is not None:
            asking["dense"] = Answerer(model, stack.enter_context(open_graph(dense, "fp32")))
        samples = 0
        for ask in asked(config):
            for name, one in asking.items():
                answer = ask(one)
                if answer is not None:
                    predictions.setdefault(name, []).append(answer)
            reference = {name: tensor.numpy() for name, tensor in recorder.outputs.items()}
            for precision, answerer in answerers.items():
                tallies[precision].add(reference, answerer.outputs, real_tokens(recorder.inputs))
            samples += len(next(iter(recorder.inputs.values())))
    parities = {precision: tally.parity() for precision, tally in tallies.items()}
    for precision, parity in parities.items():
        check(parity, precision, graphs[precision].name)
    facts = {precision: asdict(parity) | {"emulated": emulates(precision)} for precision, parity in parities.items()}
    found: dict[str, Any] = {"parity": facts}
    return found | {"samples": samples, "scores": {}} | (_scores(config, predictions) if config.labelled else {})


def _scores(config: Config, predictions: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    data = data_of(config)
    targets = data.test.tensors[-1]
    scores = {name: data.task.score(torch.cat(parts), targets) for name, parts in predictions.items()}
    return {"metric": data.task.metric, "scores": scores, "samples": len(targets)}


def _load_plan(path: Path, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Load the plan as production would: by TensorRT where a GPU is, by its ONNX file where none is.

    It is asked within its first profile, whoever answers. A file that the CPU cannot run either is not run.
    """
    manifest = read_manifest(path)
    profile = manifest.profiles[0] if manifest.profiles else {}
    feeds = resized(inputs, manifest.inputs, profile[BATCH][1] if BATCH in profile else 1, profile)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    reference = {name: tensor.numpy() for name, tensor in named_outputs(call(model, tensors)).items()}
    tally = Tally()
    try:
        with load(path, fallback="onnxruntime") as session:
            tally.add(reference, session.run(feeds), real_tokens(tensors))
            check(tally.parity(), session.manifest.precision, path.name)
            answered = {"backend": session.backend, "fallback_reason": session.fallback_reason}
    except EnvironmentLacks as error:
        return {"backend": None, "fallback_reason": str(error), "parity": None}
    return {**answered, "parity": asdict(tally.parity())}


def _latency(context: Context, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Time the sparse model against its dense twin, interleaved, on every runtime that works here."""
    settings = context.config.verify
    tables: dict[str, Any] = {}
    for runtime, (sparse, dense) in {
        "onnxruntime": ("fp32", "dense onnx"),
        "tensorrt": ("plan", "dense plan"),
    }.items():
        if sparse not in context.inputs or dense not in context.inputs:
            continue
        twins = {"sparse": partial(load, context.inputs[sparse]), "dense": partial(load, context.inputs[dense])}
        manifest, rounds, batch = read_manifest(context.inputs[sparse]), settings.latency_rounds, settings.latency_batch
        fitting = (profile for profile in manifest.profiles if BATCH in profile and _holds(profile[BATCH], batch))
        feeds = resized(inputs, manifest.inputs, batch, next(fitting, {}))
        sessions = sessions_for(context.inputs[name] for name in (sparse, dense))
        try:
            table = time_in_turns(twins, feeds, baseline="dense", rounds=rounds, samples=batch, sessions=sessions)
        except EnvironmentLacks as error:
            tables[runtime] = {"not_measured": finding("not-measured", why=str(error)).message}
        else:
            setting = {"backend": manifest.backend, "batch": batch, "sessions": sessions}
            tables[runtime] = table.to_dict() | setting | {"claim": asdict(claim(table, "sparse"))}
    return tables


def _holds(sizes: tuple[int, int, int], size: int) -> bool:
    return sizes[0] <= size <= sizes[2]
