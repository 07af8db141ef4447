"""What other patterns would keep of the weights that a run started from, layer by layer."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tnm_pipeline.pipeline.cache import StageCache
from tnm_pipeline.pipeline.report.data import Run
from tnm_pipeline.pipeline.stages import CHECKPOINT
from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.pattern import Pattern

_ALWAYS = ("2:4", "2:4-T", "4:8", "4:8-T")
_NAME = "alternatives"


@dataclass(frozen=True)
class Alternative:
    """One pattern on one layer.

    Attributes:
        layer: its name.
        pattern: text form.
        kept_magnitude: sum of kept abs(w) over sum of abs(w) under the pattern's exact mask, in [0, 1].
        violated: share of the weight's groups, of W and for a transposable pattern of W^T too, that break the pattern
            before any mask; in [0, 1].
    """

    layer: str
    pattern: str
    kept_magnitude: float
    violated: float


@dataclass(frozen=True)
class Alternatives:
    """Every pattern on every sparse layer.

    Attributes:
        source: the checkpoint whose weights were solved, relative to the run folder.
        own: the run's pattern, in text form; the most frequent of several.
        patterns: all that were tried, in order.
        rows: by layer, then by pattern; none where M does not divide the layer's inputs.
    """

    source: str
    own: str
    patterns: tuple[str, ...]
    rows: tuple[Alternative, ...]

    @property
    def table(self) -> dict[str, dict[str, Alternative]]:
        """The rows by layer and pattern."""
        layers: dict[str, dict[str, Alternative]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, {})[row.pattern] = row
        return layers


def alternatives(run: Run) -> Alternatives | None:
    """Solve the run's sparse layers for other patterns, as they were before any mask.

    Solved once: the answer is kept in the run folder's cache until weights, patterns or code change, so that a report
    of a finished run does not load torch.

    Args:
        run: its dense checkpoint is read, or the unstructured one if the exported route started from that.

    Returns:
        None where the run has no such checkpoint, or no sparse layer.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    stage = "prune" if run.route == "convert-unstructured" else "dense"
    path = run.folder / stage / CHECKPOINT
    layers = list(dict.fromkeys(layer.name for layer in run.layers if layer.pattern))
    if stage not in run.results or not path.is_file() or not layers:
        return None
    claimed = [Pattern.parse(layer.pattern) for layer in run.layers if layer.pattern]
    asked = run.config.convert.patterns and run.route != "train"
    own = max(sorted(set(claimed)), key=claimed.count) if asked else Pattern.parse(run.config.sparsity.pattern)
    patterns = sorted({own, *claimed, *map(Pattern.parse, _ALWAYS)})
    names = tuple(map(str, patterns))
    key = StageCache(run.folder).key(_NAME, {"layers": layers, "patterns": names}, {"weights": path})
    record = run.folder / ".cache" / f"{_NAME}.json"
    rows = _remembered(record, key)
    if rows is None:
        rows = tuple(_solve(path, layers, patterns))
        write_atomically(record, json.dumps({"key": key, "rows": list(map(asdict, rows))}, indent=2).encode())
    return Alternatives(f"{stage}/{CHECKPOINT}", str(own), names, rows) if rows else None


def _remembered(record: Path, key: str) -> tuple[Alternative, ...] | None:
    """What an earlier report solved; None when it was of something else, or is not whole."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return tuple(Alternative(**row) for row in known["rows"]) if known["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _solve(path: Path, layers: Sequence[str], patterns: Sequence[Pattern]) -> Iterator[Alternative]:
    from tnm_pipeline.pipeline.what_if import outcome, prunable_weights  # loads torch
    from tnm_pipeline.training.checkpoint import read_checkpoint

    weights = dict(prunable_weights(read_checkpoint(path)))
    for layer in layers:
        for pattern in patterns:
            if layer in weights and weights[layer].shape[1] % pattern.m == 0:
                found = outcome(weights[layer], pattern)
                yield Alternative(layer, found.pattern, found.kept_magnitude, found.violations / max(found.groups, 1))
