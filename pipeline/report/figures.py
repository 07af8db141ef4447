"""The pictures: plotly figures as JSON-able data, and masks as paths of an SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tnm_pipeline.pipeline.metrics import Metric
from tnm_pipeline.pipeline.report.alternatives import Alternatives
from tnm_pipeline.pipeline.report.data import Curves, Score
from tnm_pipeline.training.pattern import Pattern

_DENSE, _SPARSE, _OTHER, _THIRD = "#8b919a", "#3b82f6", "#0f9d8a", "#d97706"  # legible on white and on near-black
_SPAN = 10.0  # points: no axis of scores is shorter, or a sample's worth of noise would look like a cliff
_Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class MaskPicture:
    """A mask, one unit per weight.

    Attributes:
        title: for those who cannot see it.
        width: weights per row.
        height: rows.
        kept: SVG path of the kept weights.
        blocks: SVG path of the block borders.
        broken: SVG path around the groups, along rows, that keep more than N.
        violations: how many those are.
    """

    title: str
    width: int
    height: int
    kept: str
    blocks: str
    broken: str
    violations: int


def score_figure(scores: Sequence[Score], metric: Metric, samples: int | None) -> dict[str, Any]:
    """One dot per score, dense as a line through all of them, with intervals where the test set's size is known.

    Args:
        scores: dense first.
        metric: what they are.
        samples: of the test set, for accuracies; None leaves the intervals out.
    """
    scale = metric.scale
    intervals = [_wilson(score.value, samples) if samples else (score.value, score.value) for score in scores]
    ends = _span(100 * min(low for low, _ in intervals), 100 * max(high for _, high in intervals), scale < 100)
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [scale * score.value for score in scores],
        "y": list(range(len(scores))),
        "text": [score.label for score in scores],
        "marker": {"size": 11, "color": [_color(score) for score in scores]},
        "hovertemplate": "%{text}: %{x:.2f}%<extra></extra>" if scale == 100 else "%{text}: %{x:.4f}<extra></extra>",
    }
    if samples:
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [scale * (high - score.value) for score, (_, high) in zip(scores, intervals, strict=True)],
            "arrayminus": [scale * (score.value - low) for score, (low, _) in zip(scores, intervals, strict=True)],
            "thickness": 1.2,
            "width": 4,
            "color": _DENSE,
        }
    dense = [scale * score.value for score in scores if score.pattern == "dense"][:1]
    layout = {
        **_LAYOUT,
        "margin": {**_LAYOUT["margin"], "l": 12},
        "height": 80 + 44 * len(scores),
        "showlegend": False,
        "xaxis": _axis(f"test {metric.axis}", range=[scale * end / 100 for end in ends]),
        "yaxis": _axis(None, range=[len(scores) - 0.6, -0.9], showgrid=False, showticklabels=False),
        # Labels stand above their dots, not beside them: on a phone they would leave no room for the plot.
        "annotations": [_label(score.label, row) for row, score in enumerate(scores)],
        "shapes": [
            {
                "type": "line",
                "x0": at,
                "x1": at,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": _DENSE, "width": 1, "dash": "dot"},
            }
            for at in dense
        ],
    }
    return {"data": [trace], "layout": layout}


def curves_figure(curves: Sequence[Curves], metric: Metric) -> dict[str, Any]:
    """Training loss (log), test score and flip rate over optimizer steps, one under the other."""
    traces = []
    for curve in curves:
        color = _DENSE if curve.label == "dense" else _SPARSE
        for number, (points, scale) in enumerate(
            ((curve.loss, 1), (curve.score, metric.scale), (curve.flip_rate, 100)), start=1
        ):
            if not points:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(points) < 60 else "lines",
                    "name": curve.label,
                    "legendgroup": curve.label,
                    "showlegend": number == 1,
                    "x": [step for step, _ in points],
                    # JSON has no NaN: a diverged epoch is a gap in the line.
                    "y": [scale * value if math.isfinite(value) else None for _, value in points],
                    "xaxis": "x",
                    "yaxis": "y" if number == 1 else f"y{number}",
                    "line": {"color": color, "width": 1.8, "dash": "dot" if curve.label == "dense" else "solid"},
                    "marker": {"size": 4},
                    "hovertemplate": "step %{x}: %{y:.4g}<extra>" + curve.label + "</extra>",
                }
            )
    layout = {
        **_LAYOUT,
        "height": 640,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": _axis("optimizer step", anchor="y3"),
        "yaxis": _axis("training loss (log)", domain=[0.70, 1.0], type="log", exponentformat="none", nticks=6),
        "yaxis2": _axis(f"test {metric.axis}", domain=[0.35, 0.65]),
        "yaxis3": _axis("mask flips, %", domain=[0.0, 0.30], rangemode="tozero"),
    }
    return {"data": traces, "layout": layout}


def alternatives_figure(found: Alternatives) -> dict[str, Any]:
    """One row per layer, one dot per pattern at its kept magnitude; filled: transposable, large: the run's own."""
    layers = list(found.table)
    sizes = sorted({(pattern.m, pattern.n) for pattern in map(Pattern.parse, found.patterns)})
    colors = dict(zip(sizes, (_SPARSE, _OTHER, _THIRD), strict=False))
    traces = []
    # Filled dots first: an open one on top of them can still be seen.
    for text in sorted(found.patterns, key=lambda text: not Pattern.parse(text).transposable):
        pattern = Pattern.parse(text)
        rows = [row for row in found.rows if row.pattern == text]
        own = text == found.own
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{text}, this run's" if own else text,
                "legendrank": found.patterns.index(text),
                "x": [100 * row.kept_magnitude for row in rows],
                "y": [layers.index(row.layer) for row in rows],
                # Names of users, in texts that plotly reads as HTML.
                "text": [escape(row.layer, quote=False) for row in rows],
                "customdata": [row.violated for row in rows],
                "marker": {
                    "size": 14 if own else 9,
                    "color": colors[pattern.m, pattern.n],
                    "symbol": "circle" if pattern.transposable else "circle-open",
                    "line": {"width": 2, "color": colors[pattern.m, pattern.n]},
                },
                "hovertemplate": "%{text}: keeps %{x:.1f}%; %{customdata:.0%} of its groups break it"
                f"<extra>{text}</extra>",
            }
        )
    kept = [100 * row.kept_magnitude for row in found.rows]
    layout = {
        **_LAYOUT,
        "margin": {**_LAYOUT["margin"], "l": 12},
        "height": 120 + 44 * len(layers),
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": _axis("kept magnitude, %", range=list(_span(min(kept), max(kept)))),
        "yaxis": _axis(None, range=[len(layers) - 0.6, -0.9], showgrid=False, showticklabels=False),
        "annotations": [_label(escape(layer, quote=False), row) for row, layer in enumerate(layers)],
    }
    return {"data": traces, "layout": layout}


def mask_pictures(rows: Sequence[Sequence[int]], pattern: Pattern) -> tuple[MaskPicture, MaskPicture]:
    """A mask in GEMM form, shape (outputs, inputs), and its transpose.

    Groups lie along the rows of each picture: along the inputs of W in the first, along its outputs in the second.
    """
    transpose = [list(column) for column in zip(*rows, strict=True)]
    return _picture(rows, pattern, "mask of W"), _picture(transpose, pattern, "mask of W transposed")


def _picture(rows: Sequence[Sequence[int]], pattern: Pattern, title: str) -> MaskPicture:
    height, width, m = len(rows), len(rows[0]), pattern.m
    kept = (f"M{x} {y}h1v1h-1z" for y, row in enumerate(rows) for x, value in enumerate(row) if value)
    columns = (f"M{x} 0V{height}" for x in range(0, width + 1, m))
    lines = (f"M0 {y}H{width}" for y in range(0, height + 1, m))
    starts = [(x, y) for y, row in enumerate(rows) for x in range(0, width, m) if sum(row[x : x + m]) > pattern.n]
    broken = (f"M{x} {y}h{min(m, width - x)}v1h-{min(m, width - x)}z" for x, y in starts)
    return MaskPicture(title, width, height, "".join(kept), "".join([*columns, *lines]), "".join(broken), len(starts))


def _wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), which stays within [0, 1] near its ends."""
    weight = _Z95**2 / samples
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 / (1 + weight) * math.sqrt(share * (1 - share) / samples + weight / (4 * samples))
    return middle - half, middle + half


def _span(low: float, high: float, signed: bool = False) -> tuple[float, float]:
    """An axis on whole fives around the values, at least `_SPAN` points long, with room for the end markers.

    It ends at 0 and 100, or at -100 and 100 if the values have a sign.
    """
    floor, ceiling = 5 * math.floor((low - 1) / 5), 5 * math.ceil((high + 1) / 5)
    while ceiling - floor < _SPAN:
        floor -= 5
    return max(floor, -101 if signed else -1), min(ceiling, 101)


def _color(score: Score) -> str:
    if score.pattern == "dense":
        return _DENSE
    return _OTHER if score.label.startswith("ONNX") else _SPARSE


def _label(text: str, row: int) -> dict[str, Any]:
    """A row's name above its dots, at the left edge."""
    return {"text": text, "xref": "paper", "x": 0, "y": row, "yshift": 14, "xanchor": "left", "showarrow": False}


def _axis(title: str | None, **options: Any) -> dict[str, Any]:
    axis = {"gridcolor": "#8b919a40", "zeroline": False, "fixedrange": True, "ticks": "", **options}
    return axis | {"title": {"text": title, "standoff": 8}} if title else axis


_LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7a808a"},
    "margin": {"l": 56, "r": 12, "t": 28, "b": 44},
    "dragmode": False,
}
