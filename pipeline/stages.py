"""The stages of a run and what each depends on. Artifacts pass between them as files.

    train                                   |
    dense -> convert                        |-> best -> export -> build -> verify
    dense -> prune -> convert-unstructured  |

`train` can begin with the weights of `dense` or of `convert`, and have `dense` as its teacher.
Each stage writes into its own folder of the run folder, a `result.json` among the files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnm_pipeline.engines.driver import probe
from tnm_pipeline.export.environment import package_version
from tnm_pipeline.pipeline.cache import DATA, MODELS, source_fingerprint
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.errors import ConfigError

CHECKPOINT = "model.safetensors"
RESULT = "result.json"
LEARNED = ("dense", "train", "prune", "convert", "convert-unstructured")  # stages that may take days
EVENTS = "tensorboard"  # folder of event files, beside those of the stages: they are no artifacts
_EXPORTERS = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")  # what decides the bytes of a graph
_GIVEN = {"checkpoint", "given", "reference"}  # labels of inputs that the user made, not an earlier stage


@dataclass(frozen=True)
class Context:
    """What a stage's body is given.

    Attributes:
        config: of the run.
        settings: the part of it that the stage depends on.
        folder: the stage's own, which exists.
        inputs: label -> file that an earlier stage, or the user, made.
        progress: told (steps done, steps in all).
        should_stop: whether the user asked to stop.
        say: shows a text or a table to the person who waits.
    """

    config: Config
    settings: Mapping[str, Any]
    folder: Path
    inputs: Mapping[str, Path]
    progress: Callable[[int, int], None]
    should_stop: Callable[[], bool]
    say: Callable[[object], None]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: also of its folder.
        title: what a person reads while it runs.
        body: `module:function` of this package that does the work and returns what goes to `result.json`.
            Named, not imported: a run whose stages are all cached never imports torch.
        settings: the part of the configuration that it depends on, JSON-able.
        inputs: label -> file.
    """

    name: str
    title: str
    body: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)


def stages_of(config: Config, folder: Path) -> dict[str, Stage]:
    """The stages that a configuration asks for, by name, in the order in which they run.

    Args:
        config: resolved: model and data sources are known.
        folder: the run folder.
    """
    sections = config.model_dump(mode="json")
    model, data = config.model, config.data
    common: dict[str, Any] = {
        "seed": config.run.seed,
        "model": {"source": model.source, "args": model.args, "content": source_fingerprint(model.source, MODELS)},
        "data": {
            "source": data.source,
            "args": data.args,
            "content": source_fingerprint(data.source, DATA),
            # of sentence pairs: another file to test on, and how they are cut up
            **{key: source_fingerprint(str(data.args[key])) for key in ("test", "tokenizer") if key in data.args},
        },
    }
    sparsity = {**common, "sparsity": sections["sparsity"]}
    given = {"checkpoint": config.model.checkpoint} if config.model.checkpoint else {}
    stages: dict[str, Stage] = {}

    def add(name: str, title: str, body: str, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Path:
        stages[name] = Stage(name, title, body, settings, inputs)
        return folder / name

    if config.export.checkpoint:
        best = add("best", "take the sparse checkpoint", "learn:take", common, {"given": config.export.checkpoint})
        twin: dict[str, Path] = {}
    else:
        learning = {key: value for key, value in config.train.learning(sparse=False).items() if key != "save_every"}
        dense_settings = common if given else {**common, "train": learning}
        look = "evaluate" if config.labelled else "read"
        title = f"{look} the given checkpoint" if given else "train the dense baseline"
        dense = add("dense", title, "learn:dense", dense_settings, given) / CHECKPOINT
        twin = {"dense": dense}
        made = {route: _add_route(add, route, config, sections, sparsity, dense) for route in config.run.routes}
        best = add(
            "best",
            "choose the most accurate",
            "learn:choose",
            {"routes": config.run.routes},
            {
                **{route: path / CHECKPOINT for route, path in made.items()},
                **{f"{route} result": path / RESULT for route, path in made.items()},
            },
        )
    checkpoints = {"sparse": best / CHECKPOINT, **twin}
    asking = {**common, **_calibration(config, sections)} if not config.labelled else common
    exporters = {name: package_version(name) for name in _EXPORTERS}
    graphs = {key: value for key, value in sections["export"].items() if key != "checkpoint"}
    exporting = {**asking, "packages": exporters, "export": graphs}
    exported = add("export", "export to ONNX", "deliver:export", exporting, checkpoints)
    files = {precision: exported / f"model.{precision}.onnx" for precision in config.export.precisions}
    written = files | ({"dense onnx": exported / "dense.fp32.onnx"} if twin else {})
    machine = _machine()
    plans: dict[str, Path] = {}
    if config.trt.enabled:
        source = {"onnx": files[config.trt.precision], "export result": exported / RESULT}
        rounds = {"latency_rounds": config.verify.latency_rounds} if machine["gpus"] else {}
        building = {"trt": sections["trt"], "keep_fp32": config.export.keep_fp32, **rounds, **machine}
        built = add("build", "build TensorRT plans", "deliver:build", building, source)
        stem = f"model.{config.trt.precision}"
        plans = {
            "plan": built / f"{stem}.plan",
            "dense plan": built / f"{stem}.dense.plan",
            "engine": built / "engine.plan",
        }
    measuring = {key: value for key, value in sections["verify"].items() if key.startswith("latency")}
    settings = {**asking, **machine, "packages": exporters, "verify": measuring}
    add("verify", "verify", "verification:verify", settings, {**checkpoints, **written, **plans})
    return stages


def _machine() -> dict[str, Any]:
    """What a plan and its timing depend on besides files: a run that moves to a GPU builds and measures there."""
    driver = probe()
    builders = {name: package_version(name) for name in ("tensorrt", "tensorrt-rtx")}
    return {"gpus": [[gpu.name, gpu.compute_capability] for gpu in driver.gpus], "builders": builders}


def needed_for(stages: Mapping[str, Stage], folder: Path, targets: set[str]) -> list[Stage]:
    """The stages that the targets depend on and themselves, in order.

    Args:
        stages: all of the run.
        folder: the run folder.
        targets: names.

    Raises:
        ConfigError: a stage would clear away the file that the user told it to read.
    """
    wanted: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        wanted.add(name)
        makers = {path.relative_to(folder).parts[0] for path in stages[name].inputs.values() if folder in path.parents}
        waiting += makers & stages.keys()
    chosen = [stage for name, stage in stages.items() if name in wanted]
    _check_given(chosen, folder)
    return chosen


def _check_given(stages: Sequence[Stage], folder: Path) -> None:
    written = {(folder / stage.name).resolve(): folder / stage.name for stage in stages}
    for stage in stages:
        for label in _GIVEN & stage.inputs.keys():
            checkpoint = stage.inputs[label]
            for parent in checkpoint.resolve().parents:
                if parent in written:
                    raise ConfigError(
                        f"{checkpoint} lies in {written[parent]}, which this run writes anew: choose another folder "
                        "with --folder, or copy the checkpoint elsewhere"
                    )


def _add_route(
    add: Callable[..., Path],
    route: str,
    config: Config,
    sections: Mapping[str, Any],
    sparsity: Mapping[str, Any],
    dense: Path,
) -> Path:
    """Add the stages of one way to a sparse checkpoint; returns the folder of the last."""
    pattern = config.sparsity.pattern
    if route == "train":
        learning = {key: value for key, value in sections["train"].items() if key not in ("save_every", "dense")}
        inputs = {"teacher": dense} if config.train.teacher else {}
        if config.train.starts_from == "converted":
            inputs["start"] = _add_route(add, "convert", config, sections, sparsity, dense) / CHECKPOINT
        elif config.train.starts_from == "dense":
            inputs["start"] = dense
        title = f"train {pattern} ({config.train.recipe})"
        return add("train", title, "learn:train", {**sparsity, "train": learning}, inputs)
    settings = {**sparsity, **_conversion(config, sections)}
    reference = {"reference": config.convert.reference} if config.convert.reference else {}
    pattern = " or ".join(config.candidates)
    if route == "convert":
        return add(
            "convert", f"convert dense to {pattern}", "conversion:convert", settings, {"start": dense, **reference}
        )
    fraction = config.convert.unstructured
    pruning = {**sparsity, "fraction": fraction}
    pruned = add("prune", f"prune {fraction:.0%} unstructured", "learn:prune", pruning, {"dense": dense})
    title = f"convert the pruned one to {pattern}"
    # where the dense weights exist, fitting to their outputs beats fitting to those of the pruned ones
    starting = {"start": pruned / CHECKPOINT, **(reference or {"dense": dense})}
    return add("convert-unstructured", title, "conversion:convert", settings, starting)


def _conversion(config: Config, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversion depends on besides its inputs: the number of workers changes no bit."""
    apart = ("workers", "reference", "unstructured")
    settings = {key: value for key, value in sections["convert"].items() if key not in apart}
    return {"convert": settings, **_calibration(config, sections)}


def _calibration(config: Config, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What unlabelled inputs depend on."""
    calibration = config.calibration if config.calibration.source else config.data
    tokenizer = calibration.args.get("tokenizer")
    return {
        "calibration": {
            "source": calibration.source,
            "args": calibration.args,
            "content": source_fingerprint(calibration.source, DATA),
            "tokenizer": source_fingerprint(tokenizer) if isinstance(tokenizer, str) else None,
            **{key: sections["convert"][key] for key in ("samples", "batch_size")},
        }
    }
