"""Check the arrays given to a session against the manifest, before a runtime sees them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tnm_pipeline.engines.arrays import CudaArray, Feed, as_feed
from tnm_pipeline.engines.errors import FeedError
from tnm_pipeline.engines.tensors import TensorSpec

_REMEMBERED = 1024  # combinations of shapes that passed


class Signature:
    """What an artifact takes. Thread-safe.

    Args:
        specs: The inputs that the manifest states.
        finite: Refuse NaN and infinities, which costs a look at every value.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], *, finite: bool = False) -> None:
        self._specs = specs
        self._names = [spec.name for spec in specs]
        self._expected = [(spec.name, np.dtype(spec.dtype)) for spec in specs]
        self._passed: set[tuple[tuple[int, ...], ...]] = set()
        self._finite = [spec.name for spec in specs if finite and np.dtype(spec.dtype).kind == "f"]

    def check(self, feeds: Mapping[str, Any]) -> dict[str, Feed]:
        """Check names, dtypes, ranks and sizes, and make every array C-contiguous.

        Args:
            feeds: Input name -> array: numpy's, or what `as_feed` takes. Dynamic dimensions of one name must have one
                size in all of them.

        Returns:
            The same arrays in the order of the specs, copied only where they were not contiguous.

        Raises:
            FeedError: What is wrong, both sides, and what to pass instead.
        """
        checked = self._known(feeds)
        if checked is None:
            checked = self._explain(feeds)
        for name in self._finite:
            _check_finite(name, checked[name])
        return checked

    def _known(self, feeds: Mapping[str, Any]) -> dict[str, Feed] | None:
        """The inputs of a call like one that passed; None where only a closer look can tell."""
        if type(feeds) is not dict or len(feeds) != len(self._names):
            return None
        checked: dict[str, Feed] = {}
        for name, dtype in self._expected:
            array = feeds.get(name)
            if type(array) is not np.ndarray or array.dtype != dtype or not array.flags.c_contiguous:
                return None
            checked[name] = array
        return checked if tuple([array.shape for array in checked.values()]) in self._passed else None

    def _explain(self, feeds: Mapping[str, Any]) -> dict[str, Feed]:
        if not isinstance(feeds, Mapping):
            raise FeedError(f"inputs come by name, as a dict of arrays, not as a {type(feeds).__name__}")
        missing = [name for name in self._names if name not in feeds]
        unexpected = [name for name in feeds if name not in self._names]
        if missing or unexpected:
            signature = ", ".join(f"{spec.name}: {spec.dtype} {_shape(spec)}" for spec in self._specs)
            raise FeedError(f"missing inputs {missing}, unexpected inputs {unexpected}; the model takes {signature}")
        sizes: dict[str, tuple[int, str]] = {}  # dynamic dimension -> its size and the input that fixed it
        checked: dict[str, Feed] = {}
        for spec in self._specs:
            feed = as_feed(spec, feeds[spec.name])
            _check_array(spec, feed, sizes)
            # np.ascontiguousarray would turn a scalar into a vector
            checked[spec.name] = feed if isinstance(feed, CudaArray) else np.asarray(feed, order="C")
        if len(self._passed) >= _REMEMBERED:
            self._passed.clear()
        self._passed.add(tuple([array.shape for array in checked.values()]))
        return checked


def _check_array(spec: TensorSpec, array: Feed, sizes: dict[str, tuple[int, str]]) -> None:
    name = spec.name
    if isinstance(array, np.ma.MaskedArray):
        raise FeedError(f"input {name} has a mask, and no backend takes one: pass {name}.filled(...)")
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


def _check_finite(name: str, array: Feed) -> None:
    if isinstance(array, CudaArray):
        raise FeedError(
            f"input {name} is on a GPU, where its values are not looked at, and the session was loaded to take finite "
            "numbers only: pass a numpy array, or load with finite=False"
        )
    if np.isfinite(array).all():
        return
    place = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
    raise FeedError(
        f"input {name} is {array[place]} at {place}, and the session was loaded to take finite numbers only: clean the "
        "input, or load with finite=False"
    )


def _shape(spec: TensorSpec) -> str:
    return "(" + ", ".join(str(dim) for dim in spec.shape) + ")"
