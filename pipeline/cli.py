"""The command line. Results go to stdout, everything else to stderr; imports wait until a command needs them."""

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tnm_pipeline.pipeline import engines_cli
from tnm_pipeline.pipeline.crew import follow, follows, leading, refuse_others, together
from tnm_pipeline.pipeline.heap import ask_for_huge_pages
from tnm_pipeline.pipeline.options import (
    CalibrationOption,
    ConfigOption,
    DataOption,
    DryRunOption,
    FallbackOption,
    FolderOption,
    JsonOption,
    ModelOption,
    PatternOption,
    SetOption,
    SizeOption,
    TritonOption,
    TrustOption,
    WhatIfOption,
)
from tnm_pipeline.pipeline.output import print_json

if TYPE_CHECKING:
    from tnm_pipeline.pipeline.config import Config
    from tnm_pipeline.pipeline.run import Done

app = typer.Typer(
    name="tnm-pipeline",
    help="Train or convert a PyTorch model to transposable N:M sparsity, export it, and prove every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(engines_cli.app, name="engines")


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that come before the command."""
    if version:
        print(f"tnm-pipeline {metadata.version('tnm-pipeline')}")  # noqa: T201  # stdout is for results
        raise typer.Exit
    _debugging["on"] = debug


@app.command()
def train(
    config: ConfigOption = None,
    overrides: SetOption = None,
    folder: FolderOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    pattern: PatternOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train with masks; the sparse checkpoint is FOLDER/train/model.safetensors."""
    if follows():
        follow()
        return
    chosen = {**_options(folder, model, data, pattern), "run.routes": ["train"]}
    with leading():
        _run(_resolve(config, overrides, chosen), {"train", "dense"}, as_json)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Dense or unstructured weights: .safetensors or .pt.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    folder: FolderOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    calibration: CalibrationOption = None,
    pattern: PatternOption = None,
    dry_run: DryRunOption = False,
    trust_source: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint without training, with labels or without; writes FOLDER/convert/model.safetensors."""
    if follows():
        follow()
        return
    chosen = {
        **_options(folder, model, data, pattern),
        "run.routes": ["convert"],
        "model.checkpoint": str(checkpoint),
        "calibration.source": calibration,
    }
    with leading():
        resolved = _resolve(config, overrides, chosen, checkpoint, trust_source, needs_labels=False)
        if dry_run:
            from tnm_pipeline.pipeline.conversion import preview

            _print(preview(resolved), as_json)
        else:
            _run(resolved, {"convert"}, as_json)


@app.command()
def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Sparse checkpoint; without it, the best of what the last command made in FOLDER."),
    ] = None,
    trt: Annotated[bool, typer.Option("--trt", help="Build TensorRT plans too.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    folder: FolderOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    calibration: CalibrationOption = None,
    trust_source: TrustOption = False,
    triton: TritonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export to ONNX, and with --trt build plans; everything in FOLDER/export and FOLDER/build, verified."""
    refuse_others("export")
    if config and not trt:
        _say_if_plans_are_left_out(config)
    config = config or _config_of(folder, checkpoint, model)
    chosen = {**_options(folder, model, data, None), "trt.enabled": trt, "calibration.source": calibration}
    if checkpoint:
        chosen["export.checkpoint"] = str(checkpoint)
    resolved = _resolve(config, overrides, chosen, checkpoint, trust_source, needs_labels=False)
    if triton:
        from tnm_pipeline.pipeline.repository import check_model_name

        check_model_name(resolved)  # before any work
    _run(resolved, {"verify"}, as_json, keep=True)
    if triton:
        from tnm_pipeline.pipeline.repository import add_to_repository

        sys.stderr.write(add_to_repository(resolved, triton) + "\n")


@app.command()
def run(
    config: ConfigOption = None,
    overrides: SetOption = None,
    folder: FolderOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    pattern: PatternOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do everything that changed since the last time: train, convert, export, build, verify, report."""
    refuse_others("run")
    _run(_resolve(config, overrides, _options(folder, model, data, pattern)), None, as_json)


@app.command()
def demo(overrides: SetOption = None, folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """The whole pipeline on handwritten digits that ship with scikit-learn: about a minute, CPU only."""
    from tnm_pipeline.pipeline.resolve import DEMO

    refuse_others("demo")
    _run(_resolve(DEMO, overrides, _options(folder, None, None, None)), None, as_json)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="An .onnx or .plan file with its manifest beside it.")],
    fallback: FallbackOption = "error",
    as_json: JsonOption = False,
) -> None:
    """Check an artifact: manifest, hash, sparsity recounted, and whether it loads and runs here."""
    from tnm_pipeline.pipeline.inspect import verify_file

    _print(verify_file(artifact, fallback), as_json)


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="An .onnx file of any origin, or a .plan with its manifest.")],
    against: Annotated[
        Path | None, typer.Option("--against", help="The dense twin; default: the one beside it.")
    ] = None,
    batches: Annotated[str, typer.Option("--batches", help="Batch sizes, with commas between them.")] = "1,8,64",
    rounds: Annotated[int, typer.Option("--rounds", help="Timed rounds for each batch size.")] = 200,
    size: SizeOption = None,
    runtime: Annotated[
        Literal["onnxruntime", "tensorrt"] | None, typer.Option(help="onnxruntime times the ONNX file of a plan.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time an artifact in turns with its dense twin, and say only what the figures carry."""
    from tnm_pipeline.pipeline.bench import bench_file

    _print(bench_file(artifact, against, batches=batches, rounds=rounds, sizes=size or (), runtime=runtime), as_json)


@app.command()
def bisect(
    reference: Annotated[Path, typer.Argument(help="The fp32 .onnx file.")],
    candidate: Annotated[Path, typer.Argument(help="The same graph in fp16 or bf16.")],
    inputs: Annotated[Path | None, typer.Option("--inputs", help="An .npz file with a call's inputs by name.")] = None,
    size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Name the first layer for which a half precision is too little, and what keeps it in fp32."""
    from tnm_pipeline.pipeline.bisect import bisect_files

    _print(bisect_files(reference, candidate, inputs, size or ()), as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, an .onnx file, or a .plan with its manifest.")],
    pattern: PatternOption = None,
    what_if: WhatIfOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show layer by layer what a file holds: pattern, violations in both directions, eligibility."""
    if what_if is None:
        from tnm_pipeline.pipeline.inspect import inspect_file

        _print(inspect_file(file, pattern), as_json)
        return
    if pattern is not None:
        from tnm_pipeline.pipeline.errors import ConfigError

        raise ConfigError(
            "--pattern counts against one pattern and --what-if tries several: give one of the two, for example "
            f"--what-if {what_if},{pattern}"
        )
    from tnm_pipeline.pipeline.what_if import what_if_file

    _print(what_if_file(file, what_if), as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do, what it cannot, and the command that would change it."""
    from tnm_pipeline.pipeline.doctor import diagnose, show

    findings = diagnose()
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        show(findings)


_debugging = {"on": False}


def main() -> None:
    """Entry point: runs a command and turns an error into a message and an exit code."""
    # OpenMP threads that spin while they wait make small networks 20 times slower on a machine that has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ask_for_huge_pages()
    try:
        app()
    except SystemExit as end:
        if together() and "torch" in sys.modules:
            from tnm_pipeline.training.processes import leave

            leave(end.code if isinstance(end.code, int) else 0)
        raise
    except (Exception, KeyboardInterrupt) as error:
        if _debugging["on"]:
            raise
        from tnm_pipeline.pipeline.errors import exit_code, explain

        sys.stderr.write(f"error: {explain(error)}\n")
        raise SystemExit(exit_code(error)) from None


def _resolve(
    config: Path | None,
    overrides: list[str] | None,
    chosen: dict[str, Any],
    remembers: Path | None = None,
    trust_source: bool = False,
    *,
    needs_labels: bool = True,
) -> "Config":
    from tnm_pipeline.pipeline.resolve import resolve

    return resolve(
        config,
        overrides or [],
        chosen,
        remembers=remembers,
        trust_source=trust_source,
        needs_labels=needs_labels,
    )


def _options(folder: Path | None, model: str | None, data: str | None, pattern: str | None) -> dict[str, Any]:
    return {
        "run.folder": str(folder) if folder else None,
        "model.source": model,
        "data.source": data,
        "sparsity.pattern": pattern,
    }


def _say_if_plans_are_left_out(config: Path) -> None:
    from tnm_pipeline.pipeline.config import stated

    if stated("trt.enabled", path=config):
        sys.stderr.write(f"{config} has trt.enabled = true, which counts for `run`: export builds plans with --trt\n")


def _config_of(folder: Path | None, checkpoint: Path | None, model: str | None) -> Path | None:
    """The configuration that a run folder was made with, when `export` goes on from it; the usual folder is one."""
    from tnm_pipeline.pipeline.sections import RunSection

    if checkpoint or (folder is None and model):
        return None
    file = (folder or RunSection().folder) / "config.toml"
    return file if file.is_file() else None


def _run(config: "Config", targets: set[str] | None, as_json: bool, *, keep: bool = False) -> None:
    """Bring stages up to date; to keep means to refuse where what was trained or converted would be made again."""
    from rich.console import Console

    from tnm_pipeline.pipeline.gates import refusal
    from tnm_pipeline.pipeline.run import execute
    from tnm_pipeline.pipeline.stages import LEARNED
    from tnm_pipeline.pipeline.summary import show, to_json
    from tnm_pipeline.pipeline.tables import widened

    done: dict[str, Done] = execute(
        config, targets, console=widened(Console(stderr=True)), keep=LEARNED if keep else ()
    )
    if as_json:
        print_json(to_json(config, done))
    else:
        show(config, done)
    if "verify" in done and (refused := refusal(config.verify, done["verify"].result)):
        raise refused


def _print(facts: Any, as_json: bool) -> None:
    if as_json:
        print_json(facts.to_dict())
    else:
        facts.show()


if __name__ == "__main__":  # torchrun starts modules
    main()
