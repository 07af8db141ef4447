"""What the numbers say, in words: one sentence, and the remarks without which it would mislead."""

from collections.abc import Iterator, Mapping
from typing import Any

from tnm_pipeline.pipeline.gates import refusal
from tnm_pipeline.pipeline.report.data import Run
from tnm_pipeline.pipeline.report.layers import LayerRow
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES

_RUNTIMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}


def verdict(run: Run) -> str:
    """One sentence: the score, whether the pattern holds, latency. Only what was measured."""
    if not run.scores and not run.layers:
        return "Nothing was trained, converted or exported yet."
    sentence = "; ".join([_score(run), *_pattern(run), *_latency(run)])
    return sentence[0].upper() + sentence[1:] + "."


def remarks(run: Run) -> Iterator[str]:
    """Whole sentences about what the verdict does not prove, most serious first."""
    for layer in run.layers:
        if layer.holds is False:
            yield (
                f"Layer {layer.name} should hold {layer.pattern}, but {_groups(layer.violations)} of W and "
                f"{_groups(layer.violations_transposed)} of its transpose break it. Do not deploy this file."
            )
    if run.state("verify") == "did not finish":
        yield (
            "Verification started and did not finish, so nothing below says that the artifacts compute what the "
            "checkpoint computes. The command at the end of this page says why."
        )
    if "verify" in run.results and (refused := refusal(run.config.verify, dict(run.results["verify"]))):
        yield f"Refused: {refused}."
    stale = [stage.name for stage in run.stages if stage.state == "outdated"]
    if stale:
        yield (
            f"Outdated: {', '.join(stale)}. These results were made with other settings, inputs or code than "
            "config.toml and this version would use; the command at the end of this page makes them again."
        )
    if run.results.get("build", {}).get("identical"):
        yield (
            "The sparse plan and its dense twin are byte-identical: this builder's plans do not differ with the flag, "
            "which proves that the flag was accepted and nothing more."
        )
    yield from _tactics(run)
    candidates = run.results.get("best", {}).get("candidates", {})
    if len(candidates) > 1:
        yield (
            f"The exported route is the best of {len(candidates)} on this same test set, so its {run.metric.name} is "
            "slightly optimistic; score it on data that chose nothing before you rely on it."
        )
    recipe = RECIPES[run.config.train.recipe]
    if run.route == "train" and recipe.lr_scale != 1 and run.dense_score is not None:
        yield (
            f"The recipe {recipe.name} trained at {recipe.lr_scale:g} times the learning rate of the dense baseline, "
            "which may gain from that rate too: try train.lr on both."
        )
    loaded = run.results.get("verify", {}).get("plan")
    if loaded and loaded["fallback_reason"]:
        yield (
            f"The plan itself did not run here; {_RUNTIMES.get(loaded['backend'], loaded['backend'])} answered for it "
            f"from the ONNX file. Reason: {_stop(loaded['fallback_reason'])}"
        )


def missing(run: Run, stage: str, what: str) -> str:
    """Why a section is empty and which command fills it.

    Args:
        run: the run.
        stage: the one that would have filled it.
        what: the section's content, as the start of a sentence (`"Accuracy"`).
    """
    state = run.state(stage)
    if state is None:
        return f"{what}: the configuration of this run does not ask for the stage {stage}."
    if state == "did not finish":
        return f"{what}: the stage {stage} started and did not finish; the command at the end says why and goes on."
    return f"{what}: the stage {stage} was not run; the command at the end runs it."


def _score(run: Run) -> str:
    sparse, dense, metric = run.sparse_score, run.dense_score, run.metric
    name = "" if metric.scale == 100 else f" {metric.name}"
    if sparse is None and run.unlabelled and run.route == "given":
        return f"the given {run.pattern} checkpoint was not scored, because the run was given no labels"
    if sparse is None and run.unlabelled and run.route:
        errors = run.results[run.route]
        return (
            f"{run.pattern} was not scored, because the run was given no labels; a layer's output is off by "
            f"{errors['mean_error']:.1%} on average, {errors['mean_error_own']:.1%} by itself"
        )
    if sparse is None:
        baseline = "" if dense is None else f"dense scores{name} {metric.text(dense, 1)}, and "
        return f"{baseline}no sparse checkpoint was made yet"
    if dense is None:
        given = "the given " if run.route == "given" else "the "
        scores = f"scores{name} {metric.text(sparse, 1)}"
        return f"{given}{run.pattern} checkpoint {scores}, with no dense twin to compare it with"
    gap = metric.gap(sparse - dense, 1) + (" points" if metric.scale == 100 else "")
    if run.samples and metric.scale == 100:
        gap += f", {abs(round(run.samples * (sparse - dense)))} of {run.samples} test samples"
    allowed = run.config.verify.max_drop
    if metric.scale == 100 and 100 * (dense - sparse) > allowed:
        return f"{run.pattern} fell to {sparse:.1%} from {dense:.1%} dense ({gap}; at most -{allowed:g} was allowed)"
    return f"{run.pattern} kept{name} {metric.text(sparse, 1)} against {metric.text(dense, 1)} dense ({gap})"


def _pattern(run: Run) -> Iterator[str]:
    sparse = [layer for layer in run.layers if layer.pattern]
    if not sparse:
        if run.layers:
            yield "no layer claims a pattern"
        return
    where = "in the ONNX file" if "export" in run.results else "in the checkpoint, not exported yet"
    broken = [layer for layer in sparse if layer.holds is False]
    held = [layer for layer in sparse if layer.holds]
    if broken:
        yield f"{len(broken)} of {_layers(len(sparse))} {'break' if len(broken) > 1 else 'breaks'} the pattern {where}"
    elif not held:
        yield f"{_layers(len(sparse))} should hold the pattern, which nobody has counted in both directions yet"
    else:
        verb = "hold" if len(held) > 1 else "holds"
        yield f"{_layers(len(held))} {verb} the pattern {_directions(held)} {where}"


def _directions(layers: list[LayerRow]) -> str:
    both = [layer for layer in layers if layer.pattern and Pattern.parse(layer.pattern).transposable]
    if len(both) == len(layers):
        return "in both directions"
    return f"in both directions in {len(both)} of them" if both else "along the input axis"


def _latency(run: Run) -> Iterator[str]:
    if "verify" not in run.results:
        if not run.unlabelled:
            yield "latency was not measured yet"
        return
    portable = run.latency.get("onnxruntime")
    if portable is None:
        yield "latency was not measured, because there is no dense twin to time it against"
        return
    device = " CPU" if _without_gpu(run) else ""
    yield _portable(portable, f"ONNX Runtime{device}")
    native = run.latency.get("tensorrt")
    if native is None:
        yield "no TensorRT plan was built"
    elif "not_measured" not in native:
        yield _native(native)
    elif _without_gpu(run):
        yield "no GPU here, so TensorRT latency was not measured"
    else:
        yield "TensorRT latency was not measured (the latency section says why)"


def _portable(table: Mapping[str, Any], runtime: str) -> str:
    if "not_measured" in table:
        return f"latency on {runtime} was not measured"
    row, claim = _sparse(table), table["claim"]
    if claim["key"] == "no-difference":
        spread = f"{row['ratio']:.2f}x the dense time"
        return f"latency on {runtime} is unchanged ({spread}), because ONNX Runtime has no sparse kernels"
    if claim["key"] in ("faster", "dense-faster"):
        return f"on {runtime} {claim['sentence']}, not because of sparsity: ONNX Runtime has no sparse kernels"
    return f"latency on {runtime} allows no claim: {claim['sentence']}"


def _native(table: Mapping[str, Any]) -> str:
    gpus = table["environment"]["gpus"]
    where = f"TensorRT on {gpus[0]}" if gpus else "TensorRT"
    return f"with {where}, batch {table['batch']}: {table['claim']['sentence']}"


def _tactics(run: Run) -> Iterator[str]:
    """What is known of sparse tactics, which is the only thing that could make anything faster."""
    if "build" in run.results:
        summary = run.results["build"]["verdict"]["summary"]
        yield f"{summary[0].upper()}{summary[1:]}."


def _without_gpu(run: Run) -> bool:
    """Whether the machine that measured had no GPU; False where no measurement says."""
    recorded = [table["environment"] for table in run.latency.values() if "environment" in table]
    return any(not environment["gpus"] for environment in recorded)


def _sparse(table: Mapping[str, Any]) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in table["rows"] if row["name"] == "sparse")
    return row


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _groups(count: int | None) -> str:
    return "an unknown number of groups" if count is None else f"{count} group{'' if count == 1 else 's'}"


def _stop(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
