"""Every error that a user can cause has an exit code of its own and a message that says what to do."""

import errno
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

from tnm_pipeline import engines, export, pipeline, training
from tnm_pipeline.pipeline.errors import ExitCode, exit_code, explain

# SessionClosed, DeadlineExceeded: no command uses a session after closing it, or gives its calls a deadline.
# CaptureRefused: a call without a CUDA graph is answered without one.
# DataflowError: a model whose dataflow cannot be followed is converted without knowing it.
# FitConfigError: a configuration refuses such counts itself.
# MaskError, UnfinishedTrainingError: no command finalizes a copy, or in the middle of a training.
# OptimizerMismatchError: every command makes the optimizer from the model itself.
BUGS = {
    "tnm_pipeline.engines.errors.DeadlineExceeded",
    "tnm_pipeline.engines.errors.SessionClosed",
    "tnm_pipeline.engines.graphs.CaptureRefused",
    "tnm_pipeline.training.convert.tracing.DataflowError",
    "tnm_pipeline.training.finalize.MaskError",
    "tnm_pipeline.training.finalize.UnfinishedTrainingError",
    "tnm_pipeline.training.fitting.FitConfigError",
    "tnm_pipeline.training.sparsify.OptimizerMismatchError",
}


def named_errors() -> Iterator[type[Exception]]:
    """Every public exception class that the packages define."""
    for package in (engines, export, pipeline, training):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                module = importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                assert error.name == "triton"  # comes with CUDA builds of torch only  # noqa: PT017
                continue
            for _, cls in inspect.getmembers(module, inspect.isclass):
                ours = cls.__module__ == found.name and not cls.__name__.startswith("_")
                if ours and issubclass(cls, Exception):
                    yield cls


def test_every_named_error_has_a_code() -> None:
    errors = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in named_errors()}
    assert len(errors) > 15
    unmapped = {name for name, cls in errors.items() if exit_code(cls.__new__(cls)) is ExitCode.BUG}
    assert unmapped == BUGS


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.OUT_OF_RESOURCES, "the disk is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ExitCode.OUT_OF_RESOURCES, "train.batch_size"),
        (MemoryError(), ExitCode.OUT_OF_RESOURCES, "MemoryError"),
        (OSError(errno.EROFS, "Read-only file system", "run/x"), ExitCode.USAGE, "run/x: Read-only"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "run"), ExitCode.USAGE, "run: Is a directory"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "KeyboardInterrupt"),
        (ZeroDivisionError("division by zero"), ExitCode.BUG, "This is a bug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), ExitCode.BUG, "This is a bug"),
    ],
)
def test_errors_of_the_system(error: BaseException, code: ExitCode, said: str) -> None:
    assert exit_code(error) is code
    assert said in explain(error)


def test_a_package_that_is_missing_is_no_fault_of_the_input() -> None:
    from tnm_pipeline.training.sources import MissingPackageError, SourceError

    assert exit_code(MissingPackageError("x")) is ExitCode.ENVIRONMENT
    assert exit_code(SourceError("x")) is ExitCode.INPUT_REJECTED


def test_running_out_of_gpu_memory_is_no_bug() -> None:
    import torch

    assert exit_code(torch.OutOfMemoryError("CUDA out of memory")) is ExitCode.OUT_OF_RESOURCES
