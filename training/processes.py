"""The processes that train together: how `fit` finds them, and short messages between them. One alone is fine too."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from tnm_pipeline.training.distributed import ShardingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class WorldSizeError(ValueError):
    """The number of processes does not divide the batch."""


def make_accelerator(batch_size: int) -> "Accelerator":
    """Accelerate's view of this process and those that `torchrun` or `accelerate launch` started with it.

    Args:
        batch_size: samples in an optimizer step, over all processes.

    Raises:
        WorldSizeError: they cannot be shared out evenly.
        ShardingError: started for something else than DDP.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DistributedType

    # Without being told, Accelerate takes processes without a GPU for strangers, each of which would write all files.
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=together and not torch.accelerator.is_available(),
        # Every process takes its share of each batch, so that batch_size means the same for any number of them.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    sharding = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharding:
        raise ShardingError(
            f"fit() was started with {accelerator.distributed_type.value}, it trains with whole weights in every "
            "process: launch without it (plain torchrun gives DDP), or shard with FSDP2 in a loop of your own around a "
            "Sparsifier"
        )
    processes = accelerator.num_processes
    if batch_size % processes:
        fitting = max(processes, batch_size // processes * processes)
        raise WorldSizeError(
            f"a batch of {batch_size} samples cannot be shared out evenly among {processes} processes: make batch_size "
            f"a multiple, such as {fitting}, or start another number of processes"
        )
    return accelerator


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first_says(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them; the others do not look."""
    if count() == 1:
        return find()
    found: list[Any] = [find() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    answer: T = found[0]
    return answer


def each_says(value: T) -> list[T]:
    """The value that every process has, in the order of their ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def any_says(flag: bool, device: torch.device) -> bool:
    """Whether one of the processes says so.

    Args:
        flag: what this one says.
        device: on which they exchange tensors.
    """
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        dist.barrier()
