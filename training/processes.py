"""The processes that train together: how `fit` finds them, and short messages between them. One alone is fine too."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from tnm_pipeline.training.distributed import ShardingError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]

_NAMES: dict[Precision, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # that Accelerate has for them


class BatchSizeError(ValueError):
    """A batch that cannot be cut into equal parts for the processes and what each computes at a time."""


class PrecisionError(ValueError):
    """A precision that this machine cannot train in."""


def make_accelerator(batch_size: int, accumulate: int = 1, precision: Precision = "fp32") -> "Accelerator":
    """Accelerate's view of this process and those that `torchrun` or `accelerate launch` started with it.

    Args:
        batch_size: samples in an optimizer step, over all processes.
        accumulate: parts that a process computes its share in.
        precision: of the products, whatever the environment says.

    Raises:
        BatchSizeError: parts of one size are not possible.
        ShardingError: started for something else than DDP.
        PrecisionError: fp16 without a GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration, DistributedType

    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", _NAMES[precision]):
        warnings.warn(
            f"ACCELERATE_MIXED_PRECISION is {told}, and precision is {precision}: the latter holds", stacklevel=2
        )
    AcceleratorState._reset_state()  # else the first precision in this process would be that of all that follow
    # Without being told, Accelerate takes processes without a GPU for strangers, each of which would write all files.
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=together and not torch.accelerator.is_available(),
        # Every process takes its share of each batch, so that batch_size means the same for any number of them.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        mixed_precision=_NAMES[precision],
    )
    sharding = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharding:
        raise ShardingError(
            f"fit() was started with {accelerator.distributed_type.value}, it trains with whole weights in every "
            "process: launch without it (plain torchrun gives DDP), or shard with FSDP2 in a loop of your own around a "
            "Sparsifier"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise PrecisionError("fp16 needs a GPU, and this training runs on the CPU: take the precision bf16 or fp32")
    _check_parts(batch_size, accelerator.num_processes, accumulate)
    return accelerator


def _check_parts(batch_size: int, processes: int, accumulate: int) -> None:
    """Refuse parts of different sizes, or of no sample.

    Raises:
        BatchSizeError: names the numbers that work.
    """
    parts = processes * accumulate
    if batch_size % parts == 0:
        return
    size = max(parts, batch_size // parts * parts)
    share, rest = divmod(batch_size, processes)
    ways = "" if rest else f", or accumulate one of {[way for way in range(1, share + 1) if share % way == 0]}"
    raise BatchSizeError(
        f"a batch of {batch_size} samples cannot be cut into {parts} equal parts (processes x accumulate = {processes} "
        f"x {accumulate}): make batch_size a multiple of {parts}, such as {size}{ways}"
    )


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first_says(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them; the others do not look, and wait.

    Raises:
        Exception: in all of them, what it raised in the first.
    """
    if count() == 1:
        return find()
    found: list[Any] = [*_outcome(find)] if rank() == 0 else [None, None]
    dist.broadcast_object_list(found, src=0)
    answer, error = found
    if error is not None:
        raise error
    return cast(T, answer)


def all_do(act: Callable[[], T]) -> T:
    """What this process gets from something that all do; where one fails, none goes on to wait for it.

    Raises:
        Exception: in all of them, its own, or else that of the first process in which something failed.
    """
    answer, own = _outcome(act)
    others = each_says(own)
    error = own or next((one for one in others if one is not None), None)
    if error is not None:
        raise error
    return cast(T, answer)


def _outcome(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The answer or the error."""
    try:
        return act(), None
    except Exception as error:  # whatever it is, it is raised later
        return None, error


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


def send_weights(model: "nn.Module") -> None:
    """Give all processes the parameters and buffers that the first one has; changed in place.

    Args:
        model: of the same structure in all of them, on the device on which they exchange tensors.
    """
    if count() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def leave(code: int = 0) -> NoReturn:
    """End a process that met others, once its work is done, without Python's own end.

    Threads of gloo may free tensors while Python shuts down, which then aborts the process (torch 2.13, now and then;
    https://github.com/pytorch/pytorch/pull/179291), and torchrun ends the others, whatever they still write.

    Args:
        code: exit status.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
