"""The sizes that a plan is built for: ranges by dimension name, checked, and as shapes of every input."""

from collections.abc import Sequence

from tnm_pipeline.engines.manifest import Ranges, TensorSpec
from tnm_pipeline.export.building.request import Shapes
from tnm_pipeline.export.errors import BuildSettingError

_LARGEST = 2**31 - 1  # of a dimension of a tensor in TensorRT


def profiles_of(inputs: Sequence[TensorSpec], profiles: Sequence[Ranges]) -> tuple[Ranges, ...]:
    """The profiles as far as they concern a graph.

    A dimension name stands for one size in a call, wherever it occurs, so inputs that share a name share its range.

    Args:
        inputs: The graph's inputs.
        profiles: (min, opt, max) of dimensions by name; names that no input has are left out, so that one setting
            fits several graphs.

    Returns:
        The same profiles, each with every dynamic dimension and no other; none for a graph of fixed sizes.

    Raises:
        BuildSettingError: There is no profile for a dynamic graph, one lacks a dimension, or a range is not
            1 <= min <= opt <= max.
    """
    names = list(dict.fromkeys(dim for spec in inputs for dim in spec.shape if isinstance(dim, str)))
    for index, profile in enumerate(profiles):
        for name, sizes in profile.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2] <= _LARGEST:
                raise BuildSettingError(
                    f"profile {index} has {name!r} = {sizes}, which must be 1 <= min <= opt <= max <= {_LARGEST}"
                )
    if not names:
        return ()
    if not profiles:
        raise BuildSettingError(
            f"the graph's {', '.join(names)} may vary: give at least one profile with sizes for them"
        )
    for index, profile in enumerate(profiles):
        lacking = [name for name in names if name not in profile]
        if lacking:
            raise BuildSettingError(
                f"profile {index} says nothing of {', '.join(lacking)}, which may vary in the graph's inputs "
                f"({', '.join(f'{spec.name}: {spec.shape}' for spec in inputs)}); it has {dict(profile)}. "
                f"Add (min, opt, max) sizes, such as {{{lacking[0]!r}: (1, 8, 64)}}, or export with a fixed size there"
            )
    return tuple({name: profile[name] for name in names} for profile in profiles)


def shapes_of(inputs: Sequence[TensorSpec], profile: Ranges) -> Shapes:
    """Smallest, usual and largest shape of every input that may vary.

    Args:
        inputs: The graph's inputs.
        profile: One of what `profiles_of` returns for them.
    """

    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(profile[dim][which] if isinstance(dim, str) else dim for dim in spec.shape)

    dynamic = [spec for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)]
    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in dynamic}
