"""What a person reads on stdout when a command has ended."""

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.metrics import metric_of, score_of
from tnm_pipeline.pipeline.run import Done
from tnm_pipeline.pipeline.stages import EVENTS
from tnm_pipeline.pipeline.tables import new_console, new_table

_ROUTES = {
    "dense": "dense baseline",
    "train": "trained sparse",
    "convert": "converted from dense",
    "prune": "pruned, unstructured",
    "convert-unstructured": "pruned, then converted",
    "best": "given checkpoint",
}


def to_json(config: Config, done: dict[str, Done]) -> dict[str, Any]:
    """The results for machines: stage -> {result, cached, seconds}, and the run folder."""
    return {"folder": str(config.run.folder), "stages": {name: vars(item) for name, item in done.items()}}


def show(config: Config, done: dict[str, Done]) -> None:
    """Print the scores, what was built, and what to do next."""
    console = new_console()
    folder = config.run.folder
    console.print(_scores(config, done))
    if "export" in done:
        for file in done["export"].result["files"]:
            console.print(f"{folder / 'export' / file['file']}  {_size(file['bytes'])}")
    if "build" in done:
        built = done["build"].result
        for plan in built["plans"]:
            console.print(f"{folder / 'build' / plan['file']}  {_size(plan['bytes'])}  {_built(plan)}")
        engine = built["engine"]
        console.print(f"{folder / 'build' / engine['file']}  the {engine['twin']} plan: {engine['why']}")
        console.print(built["verdict"]["summary"])
    if "verify" in done:
        _show_verification(console, done["verify"].result)
    if any(done[name].result.get("history") for name in ("dense", "train") if name in done):
        console.print(f"curves: {shlex.join(['tensorboard', '--logdir', str(folder / EVENTS)])}")
    console.print(f"report: {folder / 'report.html'}")
    console.print(f"next: {shlex.join(['tnm-pipeline', *_next(config, done)])}")


def _scores(config: Config, done: dict[str, Done]) -> Table:
    metric = metric_of(item.result for item in done.values())
    unlabelled = [] if config.labelled else ["mean layer error"]
    table = new_table("checkpoint", "pattern", metric.name, "against dense", *unlabelled, "")
    dense = score_of(done["dense"].result) if "dense" in done else None
    chosen = done["best"].result["route"] if "best" in done else None
    for name, label in _ROUTES.items():
        if name not in done or (name == "best" and chosen != "given"):
            continue
        result = done[name].result
        score = score_of(result)
        pattern = "" if name in ("dense", "prune") else _patterns(config, result)
        if name == "best":
            pattern = _counted(done["export"].result["files"][0]["sparsity"]) if "export" in done else ""
        gap = "" if dense is None or score is None or name == "dense" else metric.gap(score - dense)
        scored = "no labels" if score is None else metric.text(score)
        errors = [] if config.labelled else [_layer_error(result)]
        table.add_row(label, pattern, scored, gap, *errors, "exported" if name == chosen else "")
    return table


def _patterns(config: Config, result: dict[str, Any]) -> str:
    """What the layers of a route hold."""
    found = sorted({row["pattern"] for row in result.get("layers", []) if row.get("pattern")})
    return ", ".join(found) or config.sparsity.pattern


def _counted(sparsity: dict[str, Any]) -> str:
    """What the layers of a given checkpoint hold: what its record promises, else what was counted in the ONNX file."""
    if promised := sorted(set(sparsity["patterns"].values())):
        return ", ".join(promised)
    if sparsity["eligible"]:
        return f"promises none; 2:4 in {sparsity['eligible']} of {sparsity['layers']} layers"
    return "dense: no layer holds 2:4 or promises a pattern"


def _layer_error(result: dict[str, Any]) -> str:
    """Of a conversion: relative error of a layer's output inside the converted model, and on the dense one's inputs."""
    if "mean_error" not in result:
        return ""
    return f"{result['mean_error']:.3f} (own {result['mean_error_own']:.3f})"


def _show_verification(console: Console, result: dict[str, Any]) -> None:
    parity = result["parity"]
    halves = [
        f", {precision} (emulated) {parity[precision]['relative_to_absmax']:.1e} of the output's absolute maximum"
        for precision in parity
        if precision != "fp32"
    ]
    console.print(f"ONNX against torch: fp32 max abs {parity['fp32']['max_abs']:.1e}{''.join(halves)}")
    for runtime, table in result["latency"].items():
        if "not_measured" in table:
            console.print(f"latency on {runtime}: not measured, it cannot run here")
            continue
        row, claim = next(row for row in table["rows"] if row["name"] == "sparse"), table["claim"]
        console.print(
            f"latency on {runtime}, batch {table['batch']}: {row['median_us']:.0f} us: "
            f"{claim['sentence']} [{claim['key']}]"
        )
    plan = result["plan"]
    if plan and plan["fallback_reason"]:
        answered = f"answered by {plan['backend']}" if plan["backend"] else "not run"
        console.print(f"the plan was {answered}: {plan['fallback_reason']}")


def _built(plan: dict[str, Any]) -> str:
    capabilities = ", ".join(plan["compute_capabilities"])
    flag = "sparse weights on" if plan["sparse_weights_flag"] else "dense twin, sparse weights off"
    picked = "" if plan["picked_layers"] is None else f", {plan['picked_layers']} layers picked"
    return f"{plan['backend']} {plan['backend_version']} for {capabilities}: {flag}{picked}"


def _next(config: Config, done: dict[str, Done]) -> list[str]:
    """The arguments of the command that a user would likely call now."""
    folder = config.run.folder
    if "build" in done:
        name = done["build"].result["engine"]["file"]
        here = done["verify"].result["plan"] if "verify" in done else None
        if here and here["backend"] is None:
            return ["inspect", str(folder / "build" / name)]
        option = ["--fallback", "onnxruntime"] if here and here["fallback_reason"] else []
        return ["verify", str(folder / "build" / name), *option]
    if "export" in done:
        return ["inspect", str(folder / "export" / "model.fp32.onnx")]
    return ["export", "--trt", "--folder", str(folder)]  # which knows model, data and the dense twin


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"
