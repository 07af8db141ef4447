"""The processes that `torchrun` started: the first does everything, the others help it to convert or to train.

Only `convert` and `train` are shared out. The first process alone reads the configuration, locks and writes the run
folder, and prints; the others wait to be told what to convert or to train, or that there is nothing. All of them must
see the run folder and the data, on several machines by a shared file system.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tnm_pipeline.pipeline.errors import ConfigError

_Work = TypeVar("_Work")


def together() -> bool:
    """Whether torchrun started this process along with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """Whether this process only helps."""
    return together() and int(os.environ["RANK"]) > 0


def refuse_others(command: str) -> None:
    """Refuse a command that several processes would carry out several times.

    Args:
        command: its name.

    Raises:
        ConfigError: torchrun started this process along with others.
    """
    if together():
        raise ConfigError(
            f"{command} runs in one process, torchrun started {os.environ['WORLD_SIZE']}: only train and convert share "
            f"their work. Start those with torchrun, and then {command} without it: what they did is found in the run "
            "folder and not done again"
        )


def companions() -> int:
    """How many of the processes run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together() else 1


@contextmanager
def leading() -> Iterator[None]:
    """In the first process: meet the others, and let them go afterwards. Without torchrun, nothing."""
    if not together():
        yield
        return
    with _met():
        yield
        _tell(None)  # not after an error: others may wait for something else, and torchrun ends them


def summon(help_with: Callable[[_Work], None], work: _Work) -> None:
    """Have the others help; one command may ask for different kinds of help in turn. Without others, nothing.

    Args:
        help_with: what they do, a function of a module.
        work: what they do it with, anything that can be pickled.
    """
    if together():
        _tell((help_with, work))


def meet() -> None:
    """Wait until every process has come here. Without others, nothing."""
    if together():
        import torch.distributed as dist

        dist.barrier()


def follow() -> None:
    """In the other processes: do what the first one summons them for, until there is nothing more."""
    import torch.distributed as dist

    with _met():
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0)
            if told[0] is None:
                return
            help_with, work = told[0]
            help_with(work)


def _tell(told: tuple[Callable[[_Work], None], _Work] | None) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([told], src=0)


@contextmanager
def _met() -> Iterator[None]:
    import torch
    import torch.distributed as dist

    # Words and models on the CPU go by gloo, training on GPUs by NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
