"""The conversion: its inputs, its plan, and the stage that carries it out."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from tnm_pipeline.pipeline.cache import JOURNAL
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.crew import companions, meet, summon
from tnm_pipeline.pipeline.errors import Stopped
from tnm_pipeline.pipeline.heap import share_heap
from tnm_pipeline.pipeline.learn import arguments, mask_picture, model_from, save, score
from tnm_pipeline.pipeline.stages import Context
from tnm_pipeline.pipeline.tables import new_console, new_table
from tnm_pipeline.training.convert import Batch, Conversion
from tnm_pipeline.training.convert import convert as convert_model
from tnm_pipeline.training.convert.budget import Budget
from tnm_pipeline.training.convert.journal import remove_journal
from tnm_pipeline.training.convert.memory import Memory, estimate_memory
from tnm_pipeline.training.convert.methods import find_method
from tnm_pipeline.training.convert.plan import Plan, PlanError
from tnm_pipeline.training.convert.planning import plan as make_plan
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sources import SourceError
from tnm_pipeline.training.unlabelled import count_examples, load_calibration

_SHORT = ("layer", "pattern", "work", "kept", "predicted error", "why")  # what is shown before work starts
_TABLES = (".tsv", ".csv")  # of pairs
_TEST_SETS = ("test", "test_where", "test_fraction")
_CONFIDENCE = 0.95  # of choose = "zeros", as in the paper


@dataclass(frozen=True)
class Preview:
    """What a conversion is going to do.

    Attributes:
        plan: layer by layer.
        method: how weights are fitted.
        examples: of calibration.
        batches: that they come in.
        memory: that it will take.
    """

    plan: Plan
    method: str
    examples: int
    batches: int
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.plan.to_dict(),
            "method": self.method,
            "examples": self.examples,
            "batches": self.batches,
            "memory": {**asdict(self.memory), "total": self.memory.total},
        }

    def show(self) -> None:
        """Print all of it on stdout."""
        console = new_console()
        console.print(self.plan.summary())
        console.print(plan_table(self.plan))
        for line in self.lines():
            console.print(line)

    def lines(self) -> tuple[str, ...]:
        """What it works on and what it takes."""
        memory = self.memory
        return (
            f"method {self.method}, {self.examples} calibration examples in {self.batches} batches",
            f"tensors beyond the model and the data, about {_mebibytes(memory.total)}: activations "
            f"{_mebibytes(memory.activations)}, masks and copies {_mebibytes(memory.copies)}, sums of a layer "
            f"{_mebibytes(memory.sums)}",
        )


def plan_table(plan: Plan, columns: tuple[str, ...] | None = None) -> Table:
    """The plan's rows; columns in which nothing is known are left out."""
    rows = plan.rows()
    shown = [name for name in rows[0] if columns is None or name in columns]
    shown = [name for name in shown if any(row[name] != "-" for row in rows)]
    table = new_table(*shown)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def preview(config: Config) -> Preview:
    """The plan of `convert CHECKPOINT --dry-run`; nothing is written.

    Args:
        config: with the checkpoint that is to be converted.

    Raises:
        Exception: whatever the conversion would raise before its first layer.
    """
    assert config.model.checkpoint is not None
    model, _ = model_from(config, config.model.checkpoint)
    reference = model_from(config, config.convert.reference)[0] if config.convert.reference else None
    return _preview(config, model, reference, calibration_batches(config))


def convert(context: Context) -> dict[str, Any]:
    """Convert a dense or unstructured checkpoint layer by layer; goes on where an interrupted run of it stopped."""
    config = context.config
    task = _Task.of(context)
    model, reference = task.models(config)
    batches = calibration_batches(config)
    found = _preview(config, model, reference, batches)
    context.say(found.plan.summary())
    context.say(plan_table(found.plan, _SHORT))
    for line in found.lines():
        context.say(line)
    if not found.plan.patterns:
        raise PlanError(
            f"the plan leaves all {len(found.plan.layers)} layers dense ({found.plan.rule}), so there is nothing to "
            "convert: add a less sparse pattern to convert.patterns, or allow more"
        )
    summon(help_to_convert, (config, task, found.plan))
    conversion = task.convert(config, model, reference, batches, found.plan, context)
    patterns = {name: str(conversion.plan.patterns[stop]) for stop, names in found.plan.stops.items() for name in names}
    made = {
        "method": config.convert.method,
        "rule": found.plan.rule,
        "calibration": {**_calibration(config), "samples": config.convert.samples, "seed": config.run.seed},
    }
    save(context, model, conversion.masks, patterns, {"conversion": made})
    remove_journal(context.folder / JOURNAL)
    return _result(config, found, conversion) | score(config, model)


def help_to_convert(work: tuple[Config, "_Task", Plan]) -> None:
    """What the processes do that do not lead: the same conversion, of which nothing is kept here."""
    config, task, plan = work
    model, reference = task.models(config)
    task.convert(config, model, reference, calibration_batches(config), plan, None)


@dataclass(frozen=True)
class _Task:
    """The files of one conversion, which all processes see."""

    start: Path
    reference: Path | None
    journal: Path

    @classmethod
    def of(cls, context: Context) -> "_Task":
        reference = context.inputs.get("reference") or context.inputs.get("dense")
        return cls(
            context.inputs["start"].absolute(),
            reference.absolute() if reference else None,
            (context.folder / JOURNAL).absolute(),
        )

    def models(self, config: Config) -> tuple[nn.Module, nn.Module | None]:
        model, _ = model_from(config, self.start)
        return model, model_from(config, self.reference)[0] if self.reference else None

    def convert(
        self,
        config: Config,
        model: nn.Module,
        reference: nn.Module | None,
        batches: list[Batch],
        plan: Plan,
        context: Context | None,
    ) -> Conversion:
        def report(name: str, done: int, total: int) -> None:
            if context is None:
                return
            context.progress(done, total)
            if context.should_stop() and done < total:
                raise Stopped(f"stopped after layer {name}, {done} of {total}; the same command goes on from there")

        share_heap()
        conversion = convert_model(
            model,
            plan,
            batches,
            method=config.convert.method,
            reference=reference,
            sequential=config.convert.sequential,
            retune_batch_norm=config.convert.retune_batch_norm,
            reorder_channels=config.convert.reorder_channels,
            workers=workers(config),
            journal=self.journal,
            on_layer=report,
        )
        meet()  # before the journal is removed, which another process may still be reading
        return conversion


def calibration_batches(config: Config) -> list[Batch]:
    """The unlabelled batches: of `[calibration]`, or the training inputs of `[data]`.

    Raises:
        SourceError: they cannot be read, or a table does not say which of its pairs are for testing.
    """
    chosen = _calibration(config)
    if config.calibration.source.endswith(_TABLES) and not chosen["args"].keys() & set(_TEST_SETS):
        raise SourceError(
            f"{chosen['source']}: calibration takes the pairs of a table that are for training, so name the others: "
            f"--set calibration.args='{{ test_fraction = 0.1 }}', or any of {', '.join(_TEST_SETS)}"
        )
    return load_calibration(
        chosen["source"],
        chosen["args"],
        samples=config.convert.samples,
        batch_size=config.convert.batch_size,
        seed=config.run.seed,
    )


def workers(config: Config) -> int:
    """As many as asked for; else the cores that this process may use, shared with those that torchrun started here."""
    if config.convert.workers is not None:
        return config.convert.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // companions())


def _preview(config: Config, model: nn.Module, reference: nn.Module | None, batches: list[Batch]) -> Preview:
    settings = config.convert
    patterns = [Pattern.parse(text) for text in config.candidates]
    find_method(settings.method, patterns)  # before any pass
    _check_names(model, batches, _calibration(config)["source"])
    budget = Budget(settings.max_dense, settings.work) if settings.choose == "budget" else None
    share_heap()
    plan = make_plan(
        model,
        batches,
        patterns,
        selection=_selection(config),
        choose=settings.choose,
        confidence=_CONFIDENCE if settings.confidence is None else settings.confidence,
        most_error=settings.most_error,
        budget=budget,
        reference=reference,
        retune_batch_norm=settings.retune_batch_norm,
        workers=workers(config),
        seed=config.run.seed,
    )
    memory = estimate_memory(
        model,
        plan,
        batches,
        reference=reference,
        sequential=settings.sequential,
        retune_batch_norm=settings.retune_batch_norm,
        reorder_channels=settings.reorder_channels,
        workers=workers(config),
    )
    return Preview(plan, settings.method, count_examples(batches), len(batches), memory)


def _check_names(model: nn.Module, batches: list[Batch], source: str) -> None:
    """Refuse inputs by names that the model's forward does not have.

    Raises:
        SourceError: there are some.
    """
    names = list(batches[0]) if isinstance(batches[0], Mapping) else []
    taken = signature(model.forward).parameters
    unknown = [name for name in names if name not in taken]
    if unknown and all(each.kind is not Parameter.VAR_KEYWORD for each in taken.values()):
        raise SourceError(
            f"{source} holds {', '.join(unknown)}, and {type(model).__name__}.forward takes {', '.join(taken)}: give "
            "the arrays those names, or x to a single one that holds the model's input"
        )


def _selection(config: Config) -> Selection:
    rules = config.sparsity.model_dump(exclude={"pattern"})
    return Selection(**rules, keep_first=config.convert.keep_first, tied=True, subclasses=True)


def _calibration(config: Config) -> dict[str, Any]:
    """Source and arguments; a pretrained text model brings its own tokenizer."""
    if not config.calibration.source:
        return {"source": config.data.source, "args": arguments(config, config.data)}
    return {"source": config.calibration.source, "args": arguments(config, config.calibration)}


def _result(config: Config, found: Preview, conversion: Conversion) -> dict[str, Any]:
    rows = [{k: v for k, v in layer.to_dict().items() if k != "seconds"} for layer in conversion.layers]
    dense = {layer.name: layer.reason for layer in found.plan.layers if layer.pattern is None}
    return {
        **conversion.to_dict(),
        "layers": rows,
        "skipped": {layer.name: layer.reason for layer in found.plan.skipped} | dense,
        "mean_error_own": sum(layer.error_own for layer in conversion.layers) / len(conversion.layers),
        "method": config.convert.method,
        "plan": {name: part for name, part in found.to_dict().items() if name != "memory"},  # it depends on the workers
        "picture": mask_picture(conversion.masks),
    }


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
