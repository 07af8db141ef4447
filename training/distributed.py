"""Masks on several processes: whole weights out of shards, and the proof that all processes have the same masks.

Under DDP every process has all weights and solves for itself. Under FSDP2 (`torch.distributed.fsdp.fully_shard`) a
process has a part of each weight, cut anywhere, also through blocks. Masks stay whole on every process, a byte a
weight: a refresh gathers one weight at a time and every process solves all of it; what is done entry by entry, the pull
of pruned weights and the final zeros, takes the process's own part.

Nothing here imports DTensors, which take a second: where they were never imported there are none.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# of the hash splitmix64 (Steele, Lea and Flood 2014), as signed integers
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
_LISTED = 5  # layers named in an error before the rest is counted


class ShardingError(ValueError):
    """Weights are spread over processes in a way that masks cannot follow."""


class OutOfSyncError(RuntimeError):
    """Processes that train one model together are at different steps or hold different masks."""


def refuse_flat_parameters(model: nn.Module) -> None:
    """Refuse FSDP1, before anybody looks at layers whose weights it took away.

    Raises:
        ShardingError: the model is wrapped in it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ShardingError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which melts weights into flat parameters that "
            "have no rows and columns: use FSDP2, torch.distributed.fsdp.fully_shard, then make the optimizer, then "
            "the Sparsifier"
        )


def refuse_foreign_parts(layers: Mapping[str, nn.Module]) -> None:
    """Refuse weights that are in parts which are not those of FSDP2.

    Args:
        layers: name -> Linear or Conv2d that shall become sparse.

    Raises:
        ShardingError: tensor parallelism, or a weight that is not of its layer's shape.
    """
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        if _is_sharded(weight) and not _is_cut_by_fsdp2_alone(layer, weight):
            raise ShardingError(
                f"the weight of {name} lies as {weight.placements} on {weight.device_mesh}: cut otherwise than by "
                "FSDP2 alone (tensor parallelism?), which masks do not follow; leave the layer out of "
                "parallelize_module, or exclude it: Selection(exclude=...)"
            )
        if isinstance(layer, nn.Linear) and weight.shape != (layer.out_features, layer.in_features):
            raise ShardingError(
                f"the weight of {name} has shape {tuple(weight.shape)} in this process, its layer is "
                f"{layer.out_features} x {layer.in_features}: something cut it up; the way that masks follow is FSDP2, "
                "torch.distributed.fsdp.fully_shard"
            )


def _is_cut_by_fsdp2_alone(layer: nn.Module, weight: "DTensor") -> bool:
    """Whether `fully_shard` has the layer, and its cut, replicated or not, is the only one."""
    cut = [placement.is_shard() for placement in weight.placements]
    return getattr(layer, "_is_fsdp_managed_module", False) and cut[-1] and not any(cut[:-1])


def reshard(model: nn.Module) -> None:
    """Drop the whole weights that FSDP2 keeps after a forward pass without a backward one: the parts are the weights.

    Args:
        model: the module that `fully_shard` was called on last, the root.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            cast("FSDPModule", module).reshard()


def full(weight: Tensor) -> Tensor:
    """The whole weight, on every process; all of them must call it.

    Args:
        weight: any tensor, sharded or not.

    Returns:
        A plain tensor, detached: the weight itself if it was whole, or gathered.
    """
    detached = weight.detach()
    return detached.full_tensor() if _is_sharded(detached) else detached


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, detached and sharing its memory."""
    detached = tensor.detach()
    return detached.to_local() if _is_sharded(detached) else detached


def local_part(whole: Tensor, weight: Tensor) -> Tensor:
    """The entries of a whole tensor that belong to what this process has of a weight.

    Args:
        whole: plain, of the weight's whole shape.
        weight: sharded or not.

    Returns:
        A view of the shape of `local(weight)`.
    """
    if not _is_sharded(weight):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def check_in_sync(step: int, masks: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Compare step and masks of all processes; all of them must call it. A process alone is in sync.

    Eight bytes a mask travel, computed where the mask is.

    Args:
        step: optimizer steps done.
        masks: layer name -> bool mask, in the same order everywhere, on any devices.
        group: the processes; None: all.

    Raises:
        OutOfSyncError: in every process, with the layers that differ and what to do.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    device = next(iter(masks.values())).device
    mine = torch.stack([torch.tensor(step, device=device), *(digest(mask).to(device) for mask in masks.values())])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    table = torch.stack(everyones).cpu()  # (processes, 1 + layers)
    differs = (table != table[0]).any(0).tolist()
    if not any(differs):
        return
    steps = table[:, 0].tolist()
    if differs[0]:
        raise OutOfSyncError(
            f"the processes are at different optimizer steps, {steps} in the order of their ranks: load the "
            "checkpoint, the Sparsifier's state too, in every process, and step in all of them equally often"
        )
    names = [name for name, differing in zip(masks, differs[1:], strict=True) if differing]
    ranks = [rank for rank, row in enumerate(table) if not torch.equal(row, table[0])]
    raise OutOfSyncError(
        f"after step {steps[0]} ranks {ranks} have other masks than rank 0 in {len(names)} of {len(masks)} layers "
        f"({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}), so their weights differ: start all "
        "from the same ones (the same seed before the model is made, or DistributedDataParallel, which sends those of "
        "rank 0 around), load a checkpoint in every process, change weights in all or none. Processes that train "
        "different models: pass each model's to Sparsifier(process_group=...)"
    )


def digest(mask: Tensor) -> Tensor:
    """A hash of a mask's entries and their places, on its device.

    Args:
        mask: bool, any shape.

    Returns:
        0-dim int64.
    """
    entries = mask.reshape(-1).view(torch.uint8)
    bytes_of_bits = nn.functional.pad(entries, (0, -entries.numel() % 64)).view(torch.int64).view(8, -1)
    words = bytes_of_bits[0].clone()  # an entry a byte, soon an entry a bit
    for bit in range(1, 8):
        words |= bytes_of_bits[bit] << bit
    # With its place in it, each word is stirred until differences do not cancel in the sum.
    mixed = torch.arange(words.numel(), device=mask.device).mul_(_STEP).add_(words)
    mixed = mixed.bitwise_xor_(mixed >> 30).mul_(_FIRST)
    mixed = mixed.bitwise_xor_(mixed >> 27).mul_(_SECOND)
    return mixed.bitwise_xor_(mixed >> 31).sum()


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, below the one that `fully_shard` puts over it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = type(module)
    return cls.__bases__[-1] if fsdp is not None and issubclass(cls, fsdp.FSDPModule) else cls


def change_type(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module one of another class in place, below what `fully_shard` puts over it."""
    own, plain = type(module), plain_type(module)
    if own is plain:
        module.__class__ = cls
        return
    bases = (*own.__bases__[:-1], cls)
    module.__class__ = type(f"FSDP{cls.__name__}", bases, {"__deepcopy__": own.__dict__["__deepcopy__"]})


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
