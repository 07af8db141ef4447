"""Check the arrays given to `Session.run` against the manifest, before a runtime sees them."""

from collections.abc import Mapping

import numpy as np

from tnm_pipeline.engines.backends import Array
from tnm_pipeline.engines.errors import FeedError
from tnm_pipeline.engines.manifest import TensorSpec


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Check names, dtypes, ranks and sizes, and make every array C-contiguous.

    Args:
        specs: The inputs that the manifest states.
        feeds: Input name -> array. Dynamic dimensions of one name must have one size in all of them.

    Returns:
        The same arrays in the order of `specs`, copied only where they were not contiguous.

    Raises:
        FeedError: What is wrong, both sides, and what to pass instead.
    """
    expected = [spec.name for spec in specs]
    missing = [name for name in expected if name not in feeds]
    unexpected = [name for name in feeds if name not in expected]
    if missing or unexpected:
        signature = ", ".join(f"{spec.name}: {spec.dtype} {_shape(spec)}" for spec in specs)
        raise FeedError(f"missing inputs {missing}, unexpected inputs {unexpected}; the model takes {signature}")
    sizes: dict[str, tuple[int, str]] = {}  # dynamic dimension -> its size and the input that fixed it
    for spec in specs:
        _check_array(spec, feeds[spec.name], sizes)
    # np.ascontiguousarray would turn a scalar into a vector
    return {name: np.asarray(feeds[name], order="C") for name in expected}


def _check_array(spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    name = spec.name
    if not isinstance(array, np.ndarray):
        raise FeedError(f"input {name} is a {type(array).__name__}: pass numpy.asarray({name}, {spec.dtype!r})")
    if array.dtype != np.dtype(spec.dtype):  # differs for a foreign byte order too
        raise FeedError(
            f"input {name} is {array.dtype}, the model takes {spec.dtype}: pass {name}.astype({spec.dtype!r})"
        )
    if array.ndim != len(spec.shape):
        raise FeedError(
            f"input {name} has {array.ndim} dimensions {array.shape}, the model takes {len(spec.shape)}: {_shape(spec)}"
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                raise FeedError(f"input {name} has size {size} on axis {axis}, the model takes {dim}: {_shape(spec)}")
            continue
        low, _, high = spec.ranges.get(dim, (0, 0, size))
        if not low <= size <= high:
            raise FeedError(
                f"input {name} has {dim} = {size} on axis {axis}, and the plan was built for {low} to "
                f"{high}: split or pad it, or rebuild with a wider range"
            )
        known, owner = sizes.setdefault(dim, (size, name))
        if known != size:
            raise FeedError(
                f"{dim} is {known} in input {owner} and {size} in input {name} (axis {axis}): make them one"
            )


def _shape(spec: TensorSpec) -> str:
    return "(" + ", ".join(str(dim) for dim in spec.shape) + ")"
