"""The stages that make checkpoints by training or pruning: dense, train, prune; and the choice between all routes."""

import json
import math
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnm_pipeline.pipeline.cache import HUB, STATE_FILE
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.crew import summon
from tnm_pipeline.pipeline.errors import exit_code
from tnm_pipeline.pipeline.metrics import metric_of, score_of
from tnm_pipeline.pipeline.sections import SourceSection
from tnm_pipeline.pipeline.stages import CHECKPOINT, EVENTS, Context
from tnm_pipeline.training.checkpoint import Checkpoint, load_into, read_checkpoint, save_checkpoint
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.loop import (
    FitConfig,
    FitResult,
    SparseTraining,
    TrainingDivergedError,
    TrainingStoppedError,
    fit,
)
from tnm_pipeline.training.masks.prune import prune_unstructured
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.processes import BatchSizeError, PrecisionError
from tnm_pipeline.training.scoring import check_match, evaluate
from tnm_pipeline.training.selection import Selection, select
from tnm_pipeline.training.sources import Splits, load_data, load_model
from tnm_pipeline.training.teacher import Teacher

_PICTURE = 16  # side of the mask picture in the report


def new_model(config: Config) -> nn.Module:
    """The untrained model; its initial weights depend on the seed alone."""
    torch.manual_seed(config.run.seed)
    return load_model(config.model.source, config.model.args)


def model_from(config: Config, path: Path) -> tuple[nn.Module, Checkpoint]:
    """The model with the weights of a checkpoint, in eval mode."""
    model = new_model(config)
    checkpoint = read_checkpoint(path)
    # what older versions of a library stored and newer ones compute, such as the position ids of transformers
    computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in computed}
    load_into(model, replace(checkpoint, tensors=kept), path)
    return model.eval(), checkpoint


def dense(context: Context) -> dict[str, Any]:
    """Train the dense baseline, or evaluate the checkpoint that was given instead, if there is data with labels."""
    config = context.config
    if "checkpoint" in context.inputs:
        model, given = model_from(config, context.inputs["checkpoint"])
        if config.labelled:
            check_match(model, data_of(config))
        save(context, model, dict(given.masks), given.record.get("layers", {}))
        return score(config, model) | {"history": None, "parameters": _parameters(model), "given": True}
    return _fit(context, new_model(config), None) | {"given": False}


def train(context: Context) -> dict[str, Any]:
    """Train with masks: from the initial weights, the dense or the converted ones; the dense ones may teach."""
    config = context.config
    model, teacher = (
        model_from(config, context.inputs[label])[0] if label in context.inputs else None
        for label in ("start", "teacher")
    )
    sparsity = SparseTraining(
        _pattern(config), config.train.full_recipe(), _selection(config), backend=config.train.backend
    )
    return _fit(context, model or new_model(config), sparsity, teacher)


def prune(context: Context) -> dict[str, Any]:
    """Make an unstructured checkpoint, as other tools leave them, for the conversion to start from."""
    config = context.config
    model, _ = model_from(config, context.inputs["dense"])
    choice = select(model, _pattern(config), _selection(config))
    sparsity = prune_unstructured(model, choice.chosen, config.convert.unstructured)
    save(context, model, {}, {})
    return score(config, model) | {"sparsity": sparsity}


def choose(context: Context) -> dict[str, Any]:
    """Take the checkpoint of the route that scores best; the first one of equals."""
    routes = context.config.run.routes
    results = {route: json.loads(context.inputs[f"{route} result"].read_text(encoding="utf-8")) for route in routes}
    metric = metric_of(results.values()).key
    candidates = {route: score_of(results[route]) for route in routes}
    best = max(routes, key=lambda route: -math.inf if (score := candidates[route]) is None else score)
    shutil.copyfile(context.inputs[best], context.folder / CHECKPOINT)
    return {"route": best, "metric": metric, metric: candidates[best], "candidates": candidates}


def take(context: Context) -> dict[str, Any]:
    """Check the sparse checkpoint that the user gave and take it as it is."""
    model, checkpoint = model_from(context.config, context.inputs["given"])
    if context.config.labelled:
        check_match(model, data_of(context.config))
    save(context, model, checkpoint.masks, checkpoint.record.get("layers", {}))
    return score(context.config, model) | {"route": "given", "candidates": {}}


def help_to_train(work: tuple[Config, SparseTraining | None, Path]) -> None:
    """What the processes do that do not lead: the same training, of which nothing is kept here.

    The first process sends them its weights, says when to stop, and why training failed.
    """
    config, sparsity, state = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model, data = new_model(config), data_of(config)
    teacher = _teacher(config, new_model(config) if sparsity and config.train.teacher else None)
    try:
        fit(
            model,
            data,
            _settings(config, sparsity),
            sparsity=sparsity,
            teacher=teacher,
            state_path=state,
            should_stop=lambda: False,
        )
    except (TrainingStoppedError, TrainingDivergedError, BatchSizeError, PrecisionError) as error:
        raise SystemExit(exit_code(error)) from None


def _settings(config: Config, sparsity: SparseTraining | None) -> FitConfig:
    return FitConfig(**config.train.learning(sparse=sparsity is not None), seed=config.run.seed)


def _teacher(config: Config, model: nn.Module | None) -> Teacher | None:
    return Teacher(model, config.train.teacher, config.train.noise) if model else None


def _fit(
    context: Context, model: nn.Module, sparsity: SparseTraining | None, teacher: nn.Module | None = None
) -> dict[str, Any]:
    config = context.config
    state = context.folder / STATE_FILE
    data = data_of(config)
    if sparsity is None and {"train", "convert-unstructured"} & set(config.run.routes):
        check_match(model, data)
        select(model, _pattern(config), _selection(config))  # rules that leave no layer are refused before any training
    summon(help_to_train, (config, sparsity, state.absolute()))
    result = fit(
        model,
        data,
        _settings(config, sparsity),
        sparsity=sparsity,
        teacher=_teacher(config, teacher),
        state_path=state,
        events=context.folder.parent / EVENTS / context.folder.name,
        on_step=context.progress,
        should_stop=context.should_stop,
    )
    save(context, model, result.masks, {row.name: row.pattern for row in result.layers if row.pattern})
    state.unlink(missing_ok=True)
    return {
        "metric": result.metric,
        result.metric: result.score,
        "history": _history(result),
        "parameters": _parameters(model),
        "layers": [row.to_dict() for row in result.layers],
        "skipped": {row.name: row.skipped for row in result.layers if row.skipped},
        "picture": mask_picture(result.masks),
        **({"packs": [choice.to_dict() for choice in result.packs]} if result.packs else {}),
    }


def _history(result: FitResult) -> dict[str, Any]:
    history = result.history
    return {"loss": history.loss, result.metric: history.score, "flip_rate": history.flip_rate}


def score(config: Config, model: nn.Module) -> dict[str, Any]:
    """What a stage's result says of the score on the test set: name and value; None where no data has labels."""
    if not config.labelled:
        return {"accuracy": None}
    data = data_of(config)
    return {"metric": data.task.metric, data.task.metric: evaluate(model, data.test, task=data.task)}


def save(
    context: Context,
    model: nn.Module,
    masks: dict[str, Tensor],
    patterns: Mapping[str, str | None],
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write a stage's checkpoint.

    Args:
        context: of the stage.
        model: whose weights.
        masks: layer -> mask.
        patterns: layer -> what it holds.
        made: further facts about its making, JSON-able, for the checkpoint's record.
    """
    config = context.config
    record = {
        **(made or {}),
        "model": {"source": config.model.source, "args": config.model.args},
        "data": {"source": config.data.source, "args": config.data.args},
        "layers": dict(patterns),
        "stage": context.folder.name,
    }
    save_checkpoint(context.folder / CHECKPOINT, Checkpoint(model.state_dict(), masks, record))


def data_of(config: Config) -> Splits:
    """The data with labels.

    Raises:
        SourceError: they cannot be read.
    """
    return load_data(config.data.source, arguments(config, config.data))


def arguments(config: Config, section: SourceSection) -> dict[str, Any]:
    """What the source of a section gets: text is cut up by the tokenizer of a pretrained model, unless it names one."""
    text = section.source.endswith((".txt", ".tsv", ".csv"))
    pretrained = text and config.model.source.startswith(HUB)
    return ({"tokenizer": config.model.source.removeprefix(HUB)} if pretrained else {}) | section.args


def _pattern(config: Config) -> Pattern:
    return Pattern.parse(config.sparsity.pattern)


def _selection(config: Config) -> Selection:
    return Selection(**config.sparsity.model_dump(exclude={"pattern"}))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def mask_picture(masks: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The top left corner of the largest mask as rows of 0 and 1, GEMM form, for the report."""
    if not masks:
        return None
    name = max(masks, key=lambda layer: masks[layer].numel())
    corner = to_gemm(masks[name])[:_PICTURE, :_PICTURE]
    return {"layer": name, "rows": corner.int().tolist()}
