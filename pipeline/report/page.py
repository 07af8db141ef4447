"""Run folder to one HTML file that needs nothing else: no network, no font, no script beside it."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tnm_pipeline.export.environment import environment
from tnm_pipeline.pipeline.report.alternatives import alternatives
from tnm_pipeline.pipeline.report.data import Run, read_run
from tnm_pipeline.pipeline.report.figures import alternatives_figure, curves_figure, mask_pictures, score_figure
from tnm_pipeline.pipeline.report.verdict import missing, remarks, verdict
from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.pattern import Pattern

REPORT = "report.html"


def render(folder: Path) -> Path:
    """Write `report.html` into a run folder, whatever stages it holds; what is missing is said.

    Args:
        folder: a run folder with its `config.toml`.

    Returns:
        The report. The same folder on the same machine gives the same bytes: there is no date in it.

    Raises:
        ConfigError: `config.toml` is missing or not valid.
        ArtifactRejected: a `result.json` is not JSON.
        CheckpointError: the checkpoint that the run started from is damaged.
    """
    run = read_run(folder)
    target = folder / REPORT
    write_atomically(target, _html(run).encode())
    return target


def _html(run: Run) -> str:
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"percent": _percent, "size": _size, "scientific": _scientific, "time": _time}
    figures: dict[str, Any] = {}
    if run.scores:
        figures["scores"] = score_figure(run.scores, run.metric, run.samples if run.metric.scale == 100 else None)
    if run.curves:
        figures["curves"] = curves_figure(run.curves, run.metric)
    others = alternatives(run)
    if others:
        figures["alternatives"] = alternatives_figure(others)
    measured = next((table["environment"] for table in run.latency.values() if "environment" in table), None)
    return jinja.get_template("template.html.j2").render(
        run=run,
        verdict=verdict(run),
        remarks=list(remarks(run)),
        missing=lambda stage, what: missing(run, stage, what),
        figures=figures,
        # plotly's own file, which is not ours to escape; a test makes sure that it cannot end its script element
        plotly=Markup(get_plotlyjs()) if figures else "",  # noqa: S704
        pictures=_pictures(run),
        alternatives=others,
        measured=measured is not None,
        environment=measured or environment(),
        command=_command(run),
    )


def _pictures(run: Run) -> Any:
    if not run.picture:
        return None
    drawn = (layer.pattern for layer in run.layers if layer.name == run.picture["layer"])
    pattern = Pattern.parse(next(drawn, None) or run.config.sparsity.pattern)
    return {"pattern": pattern, "masks": mask_pictures(run.picture["rows"], pattern), "layer": run.picture["layer"]}


def _command(run: Run) -> str:
    """What makes this run again; names the folder where the configuration does not, because it was moved."""
    command = f"tnm-pipeline run --config {shlex.quote(str(run.folder / 'config.toml'))}"
    if run.config.run.folder.resolve() != run.folder.resolve():
        command += f" --folder {shlex.quote(str(run.folder))}"
    return command


def _percent(share: float, digits: int = 2) -> str:
    return f"{share:.{digits}%}"


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def _scientific(value: float) -> str:
    return f"{value:.1e}"


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
