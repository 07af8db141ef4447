"""`bench`: an artifact against its dense twin, batch size by batch size, and what the figures let one say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tnm_pipeline.engines import ArtifactRejected, EnvironmentLacks, Manifest, TensorSpec, load
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, sha256_of
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.latency import Claim, LatencyRow, LatencyTable, claim
from tnm_pipeline.export.reasons import finding
from tnm_pipeline.export.verdicts.comparison import compare_twins, launch_finding
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.foreign import ForeignSession, inputs_of, made_up, named_sizes
from tnm_pipeline.pipeline.turns import Open, time_in_turns
from tnm_pipeline.pipeline.twins import ENGINE

Runtime = Literal["onnxruntime", "tensorrt"]
BATCHES = "1,8,64"
_FEWEST_ROUNDS = 10


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
        against: Its dense twin, None without one.
        backend: The runtime that answered.
        sizes: Of the dimensions that vary, the batch apart.
        points: By batch size.
        notes: What a reader of the figures must know, one sentence each.
    """

    artifact: Path
    against: Path | None
    backend: str
    sizes: dict[str, int]
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
            "notes": self.notes,
            "environment": dict(self.points[0].table.environment),
            "rows": [{key: value for key, value in row.items() if key != "environment"} for row in rows],
        }

    def show(self) -> None:
        """Print on stdout."""
        console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        first = self.points[0].table
        console.print(f"{self.artifact} in {self.backend}, {first.repeats} rounds at each batch size")
        table = Table("batch", "", "median", "p95", "samples/s", "ratio", "95% interval")
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
    """Time an artifact, and its dense twin in turns with it.

    Args:
        path: An ONNX file, ours or anybody's, or a plan with its manifest.
        against: The dense twin; None takes the one that `export` wrote beside it.
        batches: Batch sizes with commas between them.
        rounds: Timed rounds for each.
        sizes: `NAME=N` for each other dimension that varies.
        runtime: `"onnxruntime"` times the ONNX file that a plan was built from.

    Raises:
        ArtifactRejected: A file is missing, or not what its manifest says.
        ConfigError: A size is missing, unknown or out of range.
        EnvironmentLacks: A plan, and no GPU or runtime for it.
        ExportRejected: A file is not ONNX, does not run, or takes other inputs than its twin.
    """
    if rounds < _FEWEST_ROUNDS:
        raise ConfigError(f"--rounds {rounds} are too few for an interval; give {_FEWEST_ROUNDS} or more")
    path, notes = _to_run(path, runtime)
    if against is None and (against := twin_of(path)) is not None:
        notes.append(f"dense is {against}, which lies beside it")
    specs = _specs(path)
    dims = _Dimensions(path, specs, batches, sizes)
    artifacts = {"sparse": _opener(path)}
    if against is None:
        artifacts = {"artifact": _opener(path)}
        notes.append("nothing to compare it with: give a dense twin by --against")
    else:
        if (other := _specs(against)) != specs:
            raise ExportRejected(f"{path} takes {_show(specs)}, and {against} {_show(other)}: give twins of one model")
        artifacts["dense"] = _opener(against)
        notes += _caveats(path, against)
    baseline = "artifact" if against is None else "dense"
    points = []
    for batch in dims.batches:
        feeds = made_up(specs, dims.of(batch))
        table = time_in_turns(artifacts, feeds, baseline=baseline, rounds=rounds, samples=batch)
        points.append(Point(batch, table, None if against is None else claim(table, "sparse")))
    if against is not None:
        notes += _launch_bound(points)
    return Bench(path, against, _backend(path), dims.sizes, points, [*dims.notes, *notes])


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


def _to_run(path: Path, runtime: Runtime | None) -> tuple[Path, list[str]]:
    """The file to time, which is another one if a plan is to run in ONNX Runtime."""
    if not path.is_file():
        raise ArtifactRejected(f"{path} is no file: give an .onnx file or a .plan")
    manifest = _manifest(path)
    if manifest is None or manifest.backend == "onnxruntime":
        if runtime == "tensorrt":
            raise ConfigError(f"{path} is no plan: build one with `tnm-pipeline export --trt`, and time that")
        return path, []
    if runtime != "onnxruntime":
        return path, []
    if manifest.source_onnx is None:
        raise ArtifactRejected(f"the manifest of {path.name} names no ONNX file to time instead")
    return path.parent / manifest.source_onnx, [f"instead of {path}, the ONNX file that it was built from"]


def _manifest(path: Path) -> Manifest | None:
    """What is stated of a file; a plan without a manifest is refused."""
    if path.suffix == ".onnx" and not manifest_path(path).exists():
        return None
    return read_manifest(path)


def twin_of(path: Path) -> Path | None:
    """The dense twin that `export` writes beside an artifact; None where there is none."""
    if path.name == ENGINE:
        twin = next(iter(sorted(path.parent.glob("*.dense.plan"))), path.with_suffix(".dense.plan"))
    elif path.suffix == ".plan":
        twin = path.with_suffix(".dense.plan")
    elif path.name.startswith("model."):
        twin = path.with_name(f"dense.{path.name.removeprefix('model.')}")
    else:
        return None
    return twin if twin.is_file() else None


def _specs(path: Path) -> tuple[TensorSpec, ...]:
    manifest = _manifest(path)
    return inputs_of(path) if manifest is None else manifest.inputs


def _backend(path: Path) -> str:
    manifest = _manifest(path)
    return "onnxruntime" if manifest is None else manifest.backend


def _opener(path: Path) -> Open:
    return partial(ForeignSession, path) if _manifest(path) is None else partial(_load, path)


def _load(path: Path) -> Any:
    try:
        return load(path)
    except EnvironmentLacks as error:
        if _backend(path) != "onnxruntime":
            error.add_note(
                "what can be timed here is the ONNX file that it was built from, in ONNX Runtime, which has no product "
                f"that skips zeros: `tnm-pipeline bench {path} --runtime onnxruntime`"
            )
        raise


def _caveats(path: Path, against: Path) -> Iterator[str]:
    if sha256_of(path) == sha256_of(against):
        yield "the two files are the same byte for byte: whatever is measured, it is no effect of sparsity"
    ours, theirs = _manifest(path), _manifest(against)
    if ours is not None and theirs is not None and ours.backend != "onnxruntime":
        if (unfair := compare_twins(ours, theirs)) is not None:
            yield f"{unfair}"
    elif ours is None or ours.backend == "onnxruntime":
        yield f"{finding('wrong-runtime', runtime='ONNX Runtime')}"


def _launch_bound(points: Sequence[Point]) -> Iterator[str]:
    """Whether arithmetic is not what takes the time, from the smallest batch on."""
    medians = {point.batch: point.table.row("dense").median_us for point in points}
    found = launch_finding(medians, min(medians))
    if found is not None:
        yield f"batch {min(medians)}: {found}"


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--batches {text}: write whole numbers with commas between them, such as {BATCHES}")
    return list(dict.fromkeys(int(part) for part in parts))


def _show(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape))}" for spec in specs)


def _cells(row: LatencyRow, *, baseline: bool) -> list[str]:
    interval = "" if baseline else f"{row.ratio_low:.3f} to {row.ratio_high:.3f}"
    times = [_time(row.median_us), _time(row.p95_us)]
    return [*times, f"{row.samples_per_s:,.0f}", f"{row.ratio:.3f}", interval]


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e3 else f"{microseconds / 1e3:.2f} ms"
