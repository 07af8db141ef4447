"""A run folder as plain typed rows: what the page says comes from here."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.pipeline.cache import StageCache
from tnm_pipeline.pipeline.config import Config, load_config
from tnm_pipeline.pipeline.metrics import Metric, metric_of, score_of
from tnm_pipeline.pipeline.report.layers import LayerRow, layer_rows
from tnm_pipeline.pipeline.stages import CHECKPOINT, RESULT, Stage, stages_of

_Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class StageState:
    """One stage of the run.

    Attributes:
        name: of the stage and its folder.
        title: for a person.
        seconds: wall time of the run that did it, None where no record says.
        state: `"done"`; `"outdated"` (made with other settings, inputs or code than a run would use now);
            `"did not finish"` (a gate refused, an error, or a stop); `"not run"`.
    """

    name: str
    title: str
    seconds: float | None
    state: str


@dataclass(frozen=True)
class Score:
    """The run's metric on the test set, of one checkpoint or artifact; `pattern` is text for a person."""

    label: str
    pattern: str
    value: float
    exported: bool = False


@dataclass(frozen=True)
class Curves:
    """What one training left: points of (optimizer step, value); no flip rate when it had no masks."""

    label: str
    loss: tuple[tuple[int, float], ...]
    score: tuple[tuple[int, float], ...]
    flip_rate: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Artifact:
    """A file that can be deployed; `flag` is None where there is no sparse-weights flag to set."""

    file: str
    precision: str
    bytes: int
    sha256: str
    backend: str
    compute_capabilities: tuple[str, ...]
    flag: bool | None


@dataclass(frozen=True)
class Run:
    """Everything that a run folder holds.

    Attributes:
        folder: of the run.
        config: resolved.
        config_text: `config.toml` as it stands.
        stages: in order, of the configuration; other folders beside them are not this run's.
        results: stage name -> its `result.json`, of the stages that ended.
        route: the exported route, or the most accurate so far; None before any.
        scores: dense first.
        curves: dense first.
        layers: the per-layer table.
        picture: layer and rows (of 0 and 1) of a corner of a mask in GEMM form; None without masks.
        artifacts: checkpoint, ONNX files, plans.
    """

    folder: Path
    config: Config
    config_text: str
    stages: tuple[StageState, ...]
    results: _Results
    route: str | None
    scores: tuple[Score, ...]
    curves: tuple[Curves, ...]
    layers: tuple[LayerRow, ...]
    picture: Mapping[str, Any] | None
    artifacts: tuple[Artifact, ...]

    @property
    def pattern(self) -> str:
        """What the sparse layers claim, in text form; for a given checkpoint that claims nothing, `2:4` or `dense`."""
        claimed = sorted({layer.pattern for layer in self.layers if layer.pattern})
        if claimed or self.route != "given":
            return ", ".join(claimed) or self.config.sparsity.pattern
        return "2:4" if any(layer.eligible for layer in self.layers) else "dense"

    @property
    def unlabelled(self) -> bool:
        """Whether the run has no data to score anything on."""
        return not self.config.labelled

    @property
    def metric(self) -> Metric:
        """What everything is scored by."""
        return metric_of(self.results.values())

    @property
    def samples(self) -> int | None:
        """Size of the test set; None before `verify`, which is the first to write it down."""
        return self.results["verify"]["samples"] if "verify" in self.results else None

    @property
    def dense_score(self) -> float | None:
        """Of the dense baseline; None where it was not scored."""
        return score_of(self.results["dense"]) if "dense" in self.results else None

    @property
    def sparse_score(self) -> float | None:
        """Of the exported sparse model, in ONNX fp32 where that was scored; None where it was not."""
        if "onnx fp32" in self.results.get("verify", {}).get("scores", {}):
            return float(self.results["verify"]["scores"]["onnx fp32"])
        maker = "best" if "best" in self.results else self.route
        return score_of(self.results[maker]) if maker else None

    @property
    def latency(self) -> Mapping[str, Mapping[str, Any]]:
        """Runtime -> its table, or why there is none."""
        return self.results["verify"]["latency"] if "verify" in self.results else {}

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """The build's entry for the plan that may use sparse tactics."""
        return _sparse_plan(self.results)

    def state(self, name: str) -> str | None:
        """State of a stage; None if the configuration does not ask for it."""
        return next((stage.state for stage in self.stages if stage.name == name), None)


def read_run(folder: Path) -> Run:
    """Read everything that the report shows; of `.cache`, the times.

    Args:
        folder: a run folder with at least its `config.toml`. Files that the stages of this configuration made are
            hashed, to know which stages a run would do again: O(bytes).

    Raises:
        ConfigError: `config.toml` is missing or not valid.
        ArtifactRejected: a `result.json` is not JSON.
    """
    path = folder / "config.toml"
    config = load_config(path)
    stages = stages_of(config, folder)
    results = {name: result for name in stages if (result := _result(folder / name / RESULT)) is not None}
    route = _route(config, results)
    maker = results.get(route, {}) if route else {}
    return Run(
        folder=folder,
        config=config,
        config_text=path.read_text(encoding="utf-8"),
        stages=tuple(_states(folder, stages, results)),
        results=results,
        route=route,
        scores=tuple(_scores(config, results, route)),
        curves=tuple(_curves(config, results)),
        layers=layer_rows(
            maker,
            config.sparsity.pattern,
            _deployed(config, results),
            _sparse_plan(results),
            results["build"]["verdict"] if "build" in results else None,
        ),
        picture=maker.get("picture"),
        artifacts=tuple(_artifacts(folder, results)),
    )


def _result(path: Path) -> Mapping[str, Any] | None:
    try:
        result: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ArtifactRejected(
            f"{path} is not JSON ({error}): delete {path.parent} and run the same command again"
        ) from error
    return result


def _states(folder: Path, stages: Mapping[str, Stage], results: _Results) -> Iterator[StageState]:
    cache = StageCache(folder)
    for name, stage in stages.items():
        record = _result(folder / ".cache" / f"{name}.json")
        state = "done"
        if name not in results:
            state = "did not finish" if (folder / ".cache" / f"{name}.started").exists() else "not run"
        elif record is not None and not _is_current(cache, stage):
            state = "outdated"
        yield StageState(name, stage.title, record["seconds"] if record else None, state)


def _is_current(cache: StageCache, stage: Stage) -> bool:
    if not all(path.is_file() for path in stage.inputs.values()):
        return False
    return cache.find(stage.name, cache.key(stage.name, stage.settings, stage.inputs)) is not None


def _route(config: Config, results: _Results) -> str | None:
    if "best" in results:
        return str(results["best"]["route"])
    made = [route for route in config.run.routes if route in results]  # `train` may start from another one's result
    return max(made, key=lambda route: score_of(results[route]) or 0.0) if made else None


def _scores(config: Config, results: _Results, route: str | None) -> Iterator[Score]:
    pattern, candidates = config.sparsity.pattern, " or ".join(config.candidates)
    zeros = results.get("prune", {}).get("sparsity", 0.0)
    given = results.get("dense", {}).get("given")
    labels = {
        "dense": ("dense checkpoint, given" if given else "dense baseline", "dense"),
        "train": (f"trained sparse ({config.train.recipe})", pattern),
        "convert": (f"converted from dense ({config.convert.method})", candidates),
        "prune": ("pruned, unstructured", f"{zeros:.0%} zeros"),
        "convert-unstructured": (f"converted from the pruned one ({config.convert.method})", candidates),
    }
    for stage, (label, text) in labels.items():
        score = score_of(results[stage]) if stage in results else None
        if score is not None:
            yield Score(label, text, score, exported=stage == route and "best" in results)
    given_score = score_of(results["best"]) if route == "given" else None
    if given_score is not None:
        yield Score("checkpoint, given", "", given_score, exported=True)
    checked = results["verify"]["scores"] if "verify" in results else {}
    for key in checked:
        if key.startswith("onnx "):
            label = key.replace("onnx", "ONNX")
            yield Score(label, labels[route][1] if route in labels else "", checked[key])
    if "dense" in checked:
        yield Score("ONNX fp32 of the dense twin", "dense", checked["dense"])


def _curves(config: Config, results: _Results) -> Iterator[Curves]:
    for stage, label in (("dense", "dense"), ("train", f"sparse, {config.sparsity.pattern}")):
        result = results.get(stage, {})
        history = result.get("history")
        if history:
            points = {name: tuple((step, value) for step, value in history[name]) for name in history}
            yield Curves(label, points["loss"], points[metric_of([result]).key], points["flip_rate"])


def _sparse_plan(results: _Results) -> Mapping[str, Any] | None:
    plans = results["build"]["plans"] if "build" in results else ()
    return next((plan for plan in plans if plan["sparse_weights_flag"]), None)


def _deployed(config: Config, results: _Results) -> Mapping[str, Any] | None:
    """The sparsity of the ONNX file that plans are built from."""
    files = results["export"]["files"] if "export" in results else ()
    precision = config.trt.precision if "build" in results else "fp32"
    return next((file["sparsity"] for file in files if file["file"] == f"model.{precision}.onnx"), None)


def _artifacts(folder: Path, results: _Results) -> Iterator[Artifact]:
    checkpoint = folder / "best" / CHECKPOINT
    record = _result(folder / ".cache" / "best.json")
    if "best" in results and record and checkpoint.is_file():
        digest = record["outputs"][CHECKPOINT]
        yield Artifact(f"best/{CHECKPOINT}", "fp32", checkpoint.stat().st_size, digest, "torch", (), None)
    for file in results["export"]["files"] if "export" in results else ():
        name = f"export/{file['file']}"
        yield Artifact(name, file["precision"], file["bytes"], file["sha256"], "onnxruntime", (), None)
    for plan in results["build"]["plans"] if "build" in results else ():
        yield Artifact(
            file=f"build/{plan['file']}",
            precision=plan["file"].split(".")[1],
            bytes=plan["bytes"],
            sha256=plan["sha256"],
            backend=f"{plan['backend']} {plan['backend_version']}",
            compute_capabilities=tuple(plan["compute_capabilities"]),
            flag=plan["sparse_weights_flag"],
        )
