"""The methods by name, and what a caller must know of them before any work is done."""

from collections.abc import Iterable

from tnm_pipeline.training.convert.adaprune import adaprune
from tnm_pipeline.training.convert.admm import admm
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.magnitude import magnitude
from tnm_pipeline.training.convert.problem import Method, part_by_part
from tnm_pipeline.training.convert.sparsegpt import sparsegpt
from tnm_pipeline.training.pattern import Pattern

METHODS: dict[str, Method] = {
    "admm": admm,
    "least-squares": part_by_part(least_squares),
    "sparsegpt": part_by_part(sparsegpt),
    "adaprune": part_by_part(adaprune),
    "magnitude": part_by_part(magnitude),
}
ROW_WISE_ONLY = frozenset({"sparsegpt"})
"""Methods whose masks cannot follow a transposable pattern."""


class MethodError(ValueError):
    """A method that does not exist, or that cannot follow a pattern."""


def supports(name: str, pattern: Pattern) -> bool:
    """Whether a method of `METHODS` can follow a pattern."""
    return not (pattern.transposable and name in ROW_WISE_ONLY)


def find_method(name: str, patterns: Iterable[Pattern]) -> Method:
    """Look a method up and check that it can follow all patterns it will be given.

    Args:
        name: a name in `METHODS`.
        patterns: of the layers.

    Returns:
        The method.

    Raises:
        MethodError: no such method, or a transposable pattern for a method that is row-wise only.
    """
    if name not in METHODS:
        raise MethodError(f"unknown conversion method {name!r}: choose one of {', '.join(METHODS)}")
    for pattern in patterns:
        if not supports(name, pattern):
            row_wise = Pattern(pattern.n, pattern.m)
            others = ", ".join(other for other in METHODS if supports(other, pattern))
            raise MethodError(
                f"method {name} cannot follow {pattern}: it prunes column by column and so never sees how many weights "
                f"a column keeps; use {row_wise}, or one of {others}"
            )
    return METHODS[name]
