"""Checkpoints of a training on several processes: each writes its part, any number of processes reads them.

The parts are those of `torch.distributed.checkpoint`. A folder holds one whole checkpoint in a numbered folder of its
own; one that a kill left unfinished lacks the file `.metadata`, which comes last, and counts for nothing:

    checkpoints/000007/  __0_0.distcp  __1_0.distcp ...   parameters, masks, optimizer state
                         random.0.safetensors ...         generators of each process
                         record.json                      counters, what is sparse and how
                         .metadata

Parts and `.metadata` are pickles: read only what you wrote.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.optim import Optimizer

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.distributed import reshard
from tnm_pipeline.training.processes import all_do, count, first_says, rank
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.state import check_same_sparsity, random_state, set_random_state, sparsity_facts

_COMMIT = ".metadata"  # torch writes it last, under another name first
_RECORD = "record.json"
_GENERATORS = "tnm_pipeline.random"


def save_sharded(
    folder: Path, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier, progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint; all processes must call it. A kill leaves the one before or this one.

    Of buffers that differ between processes, such as the running statistics of batch norm, those of one are written.

    Args:
        folder: that all processes see; what it held before is removed once the new checkpoint is whole.
        model: as it trains: sharded by FSDP2, wrapped in DDP, or plain.
        optimizer: of the model.
        sparsifier: of the model; its masks are in the model.
        progress: JSON-able counters of the loop, the state of a schedule.

    Raises:
        OSError: in all processes, one cannot write; the checkpoint before is still there.
    """
    target = first_says(lambda: _clear_the_next(folder))
    reshard(model)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer.state:  # else torch would make a step to have some, which moves Adam's counters
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    record = {
        "processes": count(),
        **sparsity_facts(sparsifier),
        "sparsifier": sparsifier.state_dict(),
        "progress": dict(progress),
        "groups": None if optimizer.state else _settings(optimizer),
    }
    all_do(lambda: _write_own(target, record))
    try:
        with _quiet():
            save_parts(state, checkpoint_id=target)
    except CheckpointException as error:  # which is no Exception
        raise _first_cause(error) from None
    first_says(lambda: _remove_all_but(folder, target))


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier) -> dict[str, Any] | None:
    """Put everything back as `save_sharded` found it; all processes must call it, and there may be more or fewer.

    Random generators are put back where the number of processes is the same; else they stay as they are.

    Args:
        folder: that `save_sharded` wrote.
        model: as when it was saved, but for the number of processes; changed in place.
        optimizer: of the model, changed in place.
        sparsifier: made with the same pattern and recipe, changed in place.

    Returns:
        The progress; None where there is no whole checkpoint, and nothing has changed.

    Raises:
        CheckpointError: in all processes, it is of another model, pattern or recipe, or not every one sees it.
    """
    target = first_says(lambda: _newest(folder))
    if target is None:
        return None
    record = all_do(lambda: _read_record(target, sparsifier))
    reshard(model)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    with sparsifier.ignoring_steps():  # torch makes one where the optimizer has no state yet
        if record["groups"] is None:
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        with _quiet():
            load_parts(state, checkpoint_id=target)
    except CheckpointException as error:
        cause = _first_cause(error)
        if isinstance(cause, OSError):
            raise cause from None
        reason = str(cause).partition("\n")[0]
        raise CheckpointError(f"{target} is of another model or optimizer: {reason}") from None
    set_model_state_dict(model, state["model"])
    if record["groups"] is None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        for group, settings in zip(optimizer.param_groups, record["groups"], strict=True):
            group.update(settings)
    sparsifier.load_state_dict(record["sparsifier"])
    if record["processes"] == count():
        with safe_open(_generators_of(target, rank()), framework="pt") as file:
            others = json.loads(file.metadata()[_GENERATORS])
            set_random_state({name: file.get_tensor(name) for name in file.keys()}, others)  # noqa: SIM118  # no mapping
    progress: dict[str, Any] = record["progress"]
    return progress


def _clear_the_next(folder: Path) -> Path:
    """Where the next checkpoint goes, empty; unfinished ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in (found for found in _numbered(folder) if not (found / _COMMIT).exists()):
        shutil.rmtree(unfinished)
    newest = _newest(folder)
    target = folder / f"{int(newest.name) + 1 if newest else 1:06d}"
    target.mkdir()
    return target


def _write_own(target: Path, record: Mapping[str, Any]) -> None:
    """What torch does not write: this process's generators, and from the first one the record."""
    tensors, others = random_state()
    write_atomically(_generators_of(target, rank()), serialize(tensors, metadata={_GENERATORS: json.dumps(others)}))
    if rank() == 0:
        write_atomically(target / _RECORD, json.dumps(record).encode())


def _read_record(target: Path, sparsifier: Sparsifier) -> dict[str, Any]:
    """The record of a checkpoint that this process sees and that is of the same sparsity."""
    if not (target / _COMMIT).is_file():
        raise CheckpointError(
            f"process {rank()} does not see {target}, which the first one does: checkpoints belong on a file system "
            "that all processes share"
        )
    record: dict[str, Any] = json.loads((target / _RECORD).read_text(encoding="utf-8"))
    check_same_sparsity(target, record, sparsifier, "start anew in another folder")
    return record


def _newest(folder: Path) -> Path | None:
    """The last whole checkpoint."""
    return max((found for found in _numbered(folder) if (found / _COMMIT).exists()), default=None)


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]


def _remove_all_but(folder: Path, target: Path) -> None:
    for old in _numbered(folder):
        if old != target:
            (old / _COMMIT).unlink(missing_ok=True)  # first: half of a checkpoint must not look like a whole one
            shutil.rmtree(old)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rates and the like, JSON-able."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _generators_of(target: Path, rank: int) -> Path:
    return target / f"random.{rank}.safetensors"


def _first_cause(error: CheckpointException) -> BaseException:
    """What went wrong in the first of the processes in which something did."""
    _, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch warns of where a process is alone, and of its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        yield
