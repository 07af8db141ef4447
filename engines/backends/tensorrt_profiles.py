"""Which optimisation profile of a plan answers a call, and what warms one up."""

from collections.abc import Mapping, Sequence

import numpy as np

from tnm_pipeline.engines.arrays import Array, Feed
from tnm_pipeline.engines.errors import FeedError
from tnm_pipeline.engines.tensors import Ranges, TensorSpec


def covering_profile(profiles: Sequence[Ranges], inputs: Sequence[TensorSpec], feeds: Mapping[str, Feed]) -> int:
    """The first optimisation profile that holds all sizes of a call.

    Args:
        profiles: Those of the plan; none for fixed sizes.
        inputs: What the plan takes.
        feeds: Every input by name, each of the rank that `inputs` states.

    Returns:
        Its index; 0 for a plan of fixed sizes.

    Raises:
        FeedError: No profile holds all of them, even though the profiles together may span each.
    """
    if not profiles:
        return 0
    sizes = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    for index, profile in enumerate(profiles):
        if all(low <= sizes[dim] <= high for dim, (low, _, high) in profile.items()):
            return index
    built_for = "; ".join(
        f"profile {index}: " + ", ".join(f"{dim} {low} to {high}" for dim, (low, _, high) in profile.items())
        for index, profile in enumerate(profiles)
    )
    raise FeedError(
        f"no profile of the plan holds {', '.join(f'{dim} = {size}' for dim, size in sizes.items())} ({built_for}): "
        "split or pad the inputs, or rebuild with a profile for these sizes"
    )


def warm_sizes(profiles: Sequence[Ranges], inputs: Sequence[TensorSpec]) -> list[dict[str, int]]:
    """The sizes of dynamic dimensions that warm up a plan: each profile's largest, then those it was optimised for.

    All of the largest first: buffers then have their final place before anything is captured with their addresses.

    Args:
        profiles: Those of the plan; a plan without any has ranges in `inputs`, or fixed sizes.
        inputs: What the plan takes.

    Returns:
        Assignments of a size to every dynamic dimension, each once; one that is empty for a plan of fixed sizes.
    """
    ranges = profiles or [{dim: sizes for spec in inputs for dim, sizes in spec.ranges.items()}]
    largest = [{dim: high for dim, (_, _, high) in profile.items()} for profile in ranges]
    best = [{dim: opt for dim, (_, opt, _) in profile.items()} for profile in ranges]
    chosen: list[dict[str, int]] = []
    for sizes in largest + best:
        if sizes not in chosen:
            chosen.append(sizes)
    return chosen


def zero_feeds(inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Zeros for every input, with `sizes` for its dynamic dimensions."""
    return {
        spec.name: np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], spec.dtype)
        for spec in inputs
    }
