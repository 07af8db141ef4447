"""Exit codes: what each kind of failure means to a script that called us."""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit status of `tnm-pipeline`."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT_REJECTED = 3
    ENVIRONMENT = 4
    ACCURACY_GATE = 5
    LATENCY_GATE = 6
    OUT_OF_RESOURCES = 7
    LOCKED = 8
    INTERRUPTED = 130


class ConfigError(ValueError):
    """A configuration or command line that does not make sense; names the place."""


class RunLocked(RuntimeError):
    """Another process works in the run folder."""


class Stopped(RuntimeError):
    """The user interrupted; what was done is on disk."""


class LatencyGateFailed(RuntimeError):
    """The sparse plan is slower than the configuration demands."""


# By name, so that mapping an error never imports torch or a runtime that the command did not need.
_CODES = {
    "tnm_pipeline.pipeline.errors.ConfigError": ExitCode.USAGE,
    "tnm_pipeline.pipeline.errors.RunLocked": ExitCode.LOCKED,
    "tnm_pipeline.pipeline.errors.LatencyGateFailed": ExitCode.LATENCY_GATE,
    "tnm_pipeline.pipeline.errors.Stopped": ExitCode.INTERRUPTED,
    "tnm_pipeline.training.pattern.PatternError": ExitCode.USAGE,
    "tnm_pipeline.training.recipes.RecipeError": ExitCode.USAGE,
    "tnm_pipeline.training.backend.BackendError": ExitCode.USAGE,
    "tnm_pipeline.training.distributed.OutOfSyncError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.distributed.ShardingError": ExitCode.USAGE,
    "tnm_pipeline.training.processes.BatchSizeError": ExitCode.USAGE,
    "tnm_pipeline.training.processes.PrecisionError": ExitCode.ENVIRONMENT,
    "tnm_pipeline.training.sources.SourceError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.tasks.TaskError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.teacher.TeacherError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.sources.MissingPackageError": ExitCode.ENVIRONMENT,
    "tnm_pipeline.training.selection.SelectionError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.checkpoint.CheckpointError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.loop.TrainingDivergedError": ExitCode.ACCURACY_GATE,
    "tnm_pipeline.training.loop.TrainingStoppedError": ExitCode.INTERRUPTED,
    "tnm_pipeline.training.convert.batch.CalibrationError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.convert.budget.BudgetError": ExitCode.USAGE,
    "tnm_pipeline.training.convert.journal.JournalError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.training.convert.methods.MethodError": ExitCode.USAGE,
    "tnm_pipeline.training.convert.plan.PlanError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.export.errors.ExportRejected": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.export.errors.AccuracyGateFailed": ExitCode.ACCURACY_GATE,
    "tnm_pipeline.export.errors.BuildFailed": ExitCode.ENVIRONMENT,
    "tnm_pipeline.export.errors.BuildOutOfMemory": ExitCode.OUT_OF_RESOURCES,
    "tnm_pipeline.export.errors.BuildSettingError": ExitCode.USAGE,
    "tnm_pipeline.export.triton.RepositoryError": ExitCode.USAGE,
    "tnm_pipeline.engines.errors.ArtifactRejected": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.engines.errors.KeyRejected": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.engines.errors.FeedError": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.engines.errors.RunFailed": ExitCode.INPUT_REJECTED,
    "tnm_pipeline.engines.errors.Overloaded": ExitCode.OUT_OF_RESOURCES,
    "tnm_pipeline.engines.errors.EnvironmentLacks": ExitCode.ENVIRONMENT,
    "torch.OutOfMemoryError": ExitCode.OUT_OF_RESOURCES,
    "builtins.MemoryError": ExitCode.OUT_OF_RESOURCES,
    "builtins.KeyboardInterrupt": ExitCode.INTERRUPTED,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def exit_code(error: BaseException) -> ExitCode:
    """The code for an error; `BUG` when it is none that a user can cause."""
    for cls in type(error).__mro__:
        code = _CODES.get(f"{cls.__module__}.{cls.__qualname__}")
        if code is not None:
            return code
    if isinstance(error, OSError) and error.errno in FULL:
        return ExitCode.OUT_OF_RESOURCES
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return ExitCode.USAGE
    return ExitCode.BUG


def explain(error: BaseException) -> str:
    """What to tell the user: our own errors say it themselves, those of the system need a next step."""
    text = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
    code = exit_code(error)
    if code is ExitCode.BUG:
        return f"{type(error).__name__}: {text}\nThis is a bug: report what `tnm-pipeline --debug ...` prints"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing half-written was left. Free some space: the same command goes on from there"
    ours = type(error).__module__.startswith("tnm_pipeline.")
    if code is ExitCode.OUT_OF_RESOURCES and not ours:
        return f"out of memory ({text}): lower train.batch_size, convert.batch_size or convert.samples"
    if isinstance(error, OSError):
        return f"cannot use {error.filename}: {error.strerror}"
    return text
