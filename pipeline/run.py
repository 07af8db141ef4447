"""Execute stages: skip what is done, show progress, stop cleanly on Ctrl-C, leave a record."""

import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tnm_pipeline.pipeline.cache import StageCache, locked
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.errors import ConfigError, Stopped
from tnm_pipeline.pipeline.report import render
from tnm_pipeline.pipeline.stages import RESULT, Context, Stage, needed_for, stages_of
from tnm_pipeline.training.atomic import write_atomically


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        result: what its body returned.
        cached: whether an earlier run had done it.
        seconds: wall time, of the run that did it.
    """

    result: dict[str, Any]
    cached: bool
    seconds: float


def execute(
    config: Config, targets: set[str] | None = None, *, console: Console, keep: Collection[str] = ()
) -> dict[str, Done]:
    """Bring the run folder up to date.

    Args:
        config: resolved; written to `config.toml` in the run folder.
        targets: names of the stages wanted; the stages that they need run first. None: all.
        console: where progress goes (stderr).
        keep: stages that are not done again once they are finished.

    Returns:
        Stage name -> what it left, in the order of execution. Whether it is good enough is for `gates.refusal`.

    Raises:
        RunLocked: another process works in the folder.
        ConfigError: a stage's folder holds files that no run made, or one that is to be kept would be done again.
        Stopped: Ctrl-C; everything done is on disk.
        Exception: whatever a stage raises; earlier stages stay done.
    """
    folder = config.run.folder
    with locked(folder), _interruptible() as should_stop:
        stages = stages_of(config, folder)
        wanted = needed_for(stages, folder, targets if targets is not None else set(stages))
        cache = StageCache(folder)
        _refuse_to_replace([stage for stage in wanted if stage.name in keep], cache)
        write_atomically(folder / "config.toml", config.to_toml().encode())
        for stage in wanted:
            cache.refuse_foreign_files(stage.name)
        try:
            with _progress(console) as progress:
                done = _execute(config, wanted, cache, progress, should_stop)
        except BaseException as error:
            _render_failed(folder, error)
            raise
        render(folder)
        return done


def _render_failed(folder: Path, error: BaseException) -> None:
    """A run that failed has a report too: how far it came. Trouble with it must not hide what failed."""
    try:
        render(folder)
    except Exception as trouble:
        error.add_note(f"the report was not written either: {trouble}")


def _refuse_to_replace(stages: Sequence[Stage], cache: StageCache) -> None:
    """Make sure that what some run has finished of these stages still stands, file by file.

    Raises:
        ConfigError: a stage would be done again.
    """
    for stage in stages:
        if not cache.is_finished(stage.name):
            continue
        read = all(path.is_file() for path in stage.inputs.values())
        if not read or cache.find(stage.name, cache.key(stage.name, stage.settings, stage.inputs)) is None:
            raise ConfigError(
                f"{cache.folder / stage.name} is damaged, or was made with other settings, model code, data or another "
                "version of tnm-pipeline, and would be replaced: `tnm-pipeline run` with the same configuration does "
                "that; or give export the checkpoint that it is to take"
            )


def _execute(
    config: Config, stages: Sequence[Stage], cache: StageCache, progress: Progress, should_stop: Callable[[], bool]
) -> dict[str, Done]:
    finished: dict[str, Done] = {}
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.title}"
        key = cache.key(stage.name, stage.settings, stage.inputs)
        record = cache.find(stage.name, key)
        cached = record is not None
        if record is None:
            started = time.monotonic()
            folder = cache.begin(stage.name, key)
            task = progress.add_task(label, total=None)
            context = Context(
                config=config,
                settings=stage.settings,
                folder=folder,
                inputs=stage.inputs,
                progress=_reporter(progress, task),
                should_stop=should_stop,
                say=_speaker(progress.console),
            )
            result = _body(stage)(context)
            write_atomically(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
            record = cache.finish(stage.name, key, started)
            progress.remove_task(task)
        took = "cached" if cached else f"{record.seconds:.1f} s"
        progress.console.print(f"{label}: {took}", highlight=False, markup=False)
        content = (cache.folder / stage.name / RESULT).read_text(encoding="utf-8")
        finished[stage.name] = Done(json.loads(content), cached, record.seconds)
        if should_stop() and number < len(stages):
            raise Stopped(f"stopped after {stage.name}; the same command goes on from there")
    return finished


def _body(stage: Stage) -> Callable[[Context], dict[str, Any]]:
    module, _, name = stage.body.partition(":")
    body: Callable[[Context], dict[str, Any]] = getattr(
        importlib.import_module(f"tnm_pipeline.pipeline.{module}"), name
    )
    return body


def _reporter(progress: Progress, task: Any) -> Callable[[int, int], None]:
    return lambda done, total: progress.update(task, completed=done, total=total)


def _speaker(console: Console) -> Callable[[object], None]:
    return lambda thing: console.print(thing, highlight=False, markup=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop at the next safe point; the second stops at once."""
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        sys.stderr.write("\nstopping at the next safe point; press Ctrl-C again to stop at once\n")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)
