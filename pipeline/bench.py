"""`bench`: an artifact against its dense twin, batch size by batch size, and what the figures let one say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnm_pipeline.engines import TensorSpec
from tnm_pipeline.export.latency import Claim, LatencyRow, LatencyTable, claim
from tnm_pipeline.export.verdicts.comparison import launch_finding
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.foreign import made_up, named_sizes
from tnm_pipeline.pipeline.rivals import Rival, Runtime, caveats, check_rivals, names_of, twin_of
from tnm_pipeline.pipeline.tables import new_console, new_table
from tnm_pipeline.pipeline.turns import sessions_for, time_in_turns

BATCHES = "1,8,64"
_FEWEST_ROUNDS = 10
_DIGITS = 19  # of numbers that no index of an array holds


@dataclass(frozen=True)
class Point:
    """One batch size. `claim` is None where there is no dense twin to compare with."""

    batch: int
    table: LatencyTable
    claim: Claim | None


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        artifact: The file.
        against: What it was compared with, its dense twin where one is known; None without one.
        backend: The runtime that answered.
        sizes: Of the dimensions that vary, the batch apart.
        sessions: How many of each file took turns.
        points: By batch size.
        notes: What a reader of the figures must know, one sentence each.
    """

    artifact: Path
    against: Path | None
    backend: str
    sizes: dict[str, int]
    sessions: int
    points: list[Point]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        rows = [
            {"batch": point.batch, "claim": None if point.claim is None else vars(point.claim)} | point.table.to_dict()
            for point in self.points
        ]
        return {
            "artifact": str(self.artifact),
            "against": None if self.against is None else str(self.against),
            "backend": self.backend,
            "sizes": self.sizes,
            "sessions": self.sessions,
            "notes": self.notes,
            "environment": dict(self.points[0].table.environment),
            "rows": [{key: value for key, value in row.items() if key != "environment"} for row in rows],
        }

    def show(self) -> None:
        """Print on stdout."""
        console = new_console()
        first = self.points[0].table
        console.print(f"{self.artifact} in {self.backend}, {first.repeats} rounds at each batch size")
        table = new_table("batch", "", "median", "p95", "samples/s", "ratio", "95% interval")
        for point in self.points:
            for row in point.table.rows:
                table.add_row(str(point.batch), row.name, *_cells(row, baseline=row.name == point.table.baseline))
        console.print(table)
        for point in self.points:
            if point.claim is not None:
                remedy = f": {point.claim.remedy}" if point.claim.remedy else ""
                console.print(f"batch {point.batch}: {point.claim.sentence}{remedy} [{point.claim.key}]")
        for note in self.notes:
            console.print(note)


def bench_file(
    path: Path,
    against: Path | None = None,
    *,
    batches: str = BATCHES,
    rounds: int = 200,
    sizes: Sequence[str] = (),
    runtime: Runtime | None = None,
) -> Bench:
    """Time an artifact, and its dense twin, or another file, in turns with it.

    Rows are called `sparse` and `dense` where the files say so, else by the names of the files.

    Args:
        path: An ONNX file, ours or anybody's, or a plan with its manifest.
        against: What to compare it with; None takes the dense twin that `export` wrote beside it.
        batches: Batch sizes with commas between them.
        rounds: Timed rounds for each.
        sizes: `NAME=N` for each other dimension that varies.
        runtime: `"onnxruntime"` times the ONNX file that a plan was built from.

    Raises:
        ArtifactRejected: A file is missing, or not what its manifest says.
        ConfigError: A size is missing, unknown or out of range, or the two files run in different runtimes.
        EnvironmentLacks: A plan, and no GPU or runtime for it.
        ExportRejected: A file is not ONNX, does not run, or takes other inputs than its twin.
    """
    if rounds < _FEWEST_ROUNDS:
        raise ConfigError(f"--rounds {rounds} are too few for an interval; give {_FEWEST_ROUNDS} or more")
    ours, notes = Rival(path, runtime), []
    if ours.path != path:
        notes.append(f"instead of {path}, the ONNX file that it was built from")
    if against is None and (against := twin_of(ours.path)) is not None:
        notes.append(f"compared with {against}, which lies beside it")
    dims = _Dimensions(ours.path, ours.inputs, batches, sizes)
    if against is None:
        name = baseline = "artifact"
        rivals = {name: ours}
        notes.append("nothing to compare it with: give a dense twin by --against")
    else:
        theirs = Rival(against, runtime)
        check_rivals(ours, theirs)
        name, baseline = names_of(ours, theirs)
        rivals = {name: ours, baseline: theirs}
        notes += caveats(ours, theirs)
    sessions = sessions_for(rival.path for rival in rivals.values())
    if sessions == 1:
        notes.append("one session of each, as the files are large: chance moves their times more than usual")
    openers = {name: rival.open for name, rival in rivals.items()}
    points = []
    for batch in dims.batches:
        feeds, counts = made_up(ours.inputs, dims.of(batch)), {"samples": batch, "sessions": sessions}
        table = time_in_turns(openers, feeds, baseline=baseline, rounds=rounds, **counts)
        points.append(Point(batch, table, claim(table, name) if len(rivals) > 1 else None))
    if name == "sparse":
        notes += _launch_bound(points)
    other = rivals[baseline].path if len(rivals) > 1 else None
    return Bench(ours.path, other, ours.backend, dims.sizes, sessions, points, [*dims.notes, *notes])


class _Dimensions:
    """How large each dimension is.

    Attributes:
        batches: The batch sizes that the artifact takes.
        sizes: Of the other dimensions that vary.
        notes: What was left out.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], batches: str, sizes: Sequence[str]) -> None:
        first = specs[0].shape[0] if specs and specs[0].shape else 1
        self._batch = str(first)
        if any(text.startswith(f"{self._batch}=") for text in sizes):
            raise ConfigError(f"{self._batch} is the batch of {path.name}: give its sizes by --batches")
        ranges = {dim: sides for spec in specs for dim, sides in spec.ranges.items()}
        usual = {dim: best for dim, (_, best, _) in ranges.items()} | {self._batch: 1}
        self.notes: list[str] = []
        self.sizes = named_sizes(path, specs, sizes, usual)
        self.sizes.pop(self._batch, None)
        self.batches = self._fitting(path, _whole_numbers(batches), first, ranges.get(self._batch))

    def of(self, batch: int) -> dict[str, int]:
        """Size of every dimension with a name."""
        return self.sizes | {self._batch: batch}

    def _fitting(
        self, path: Path, asked: list[int], first: int | str, bounds: tuple[int, int, int] | None
    ) -> list[int]:
        if isinstance(first, int):
            self.notes.append(f"the file was made for batches of {first} and no others")
            return [first]
        low, _, high = bounds or (1, 0, max(asked))
        fitting = [batch for batch in asked if low <= batch <= high]
        if not fitting:
            raise ConfigError(
                f"{path.name} takes batches of {low} to {high}, none of {asked}: give others by --batches"
            )
        if len(fitting) < len(asked):
            self.notes.append(f"batches of {sorted(set(asked) - set(fitting))} are left out: it takes {low} to {high}")
        return fitting


def _launch_bound(points: Sequence[Point]) -> Iterator[str]:
    """Whether arithmetic is not what takes the time, from the smallest batch on."""
    medians = {point.batch: point.table.row("dense").median_us for point in points}
    found = launch_finding(medians, min(medians))
    if found is not None:
        yield f"batch {min(medians)}: {found}"


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < _DIGITS and int(part) > 0 for part in parts):
        raise ConfigError(f"--batches {text}: write whole numbers with commas between them, such as {BATCHES}")
    return list(dict.fromkeys(int(part) for part in parts))


def _cells(row: LatencyRow, *, baseline: bool) -> list[str]:
    interval = "" if baseline else f"{row.ratio_low:.3f} to {row.ratio_high:.3f}"
    times = [_time(row.median_us), _time(row.p95_us)]
    return [*times, f"{row.samples_per_s:,.0f}", f"{row.ratio:.3f}", interval]


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e3 else f"{microseconds / 1e3:.2f} ms"
