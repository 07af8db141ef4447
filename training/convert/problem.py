"""What every conversion method is given, and what it returns.

Shape legend: O = out features (or some rows of them), K = reduction length of the GEMM matrix.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.masks import Solver, solve
from tnm_pipeline.training.pattern import Pattern

ROWS_AT_ONCE = 128  # a piece of work for one worker
# Of the mean diagonal of the gram matrix: where a trial begins, and what a layer gets without one. Against 1e-3, on the
# held-out error: -0.4% on the narrow and -1.5% on the wide layers of a sentence encoder, +0.8% on digits.
DAMPING = 3e-2


def pieces(rows: int, pattern: Pattern) -> list[slice]:
    """Cut the rows of a layer into whole blocks of a pattern, the same way for any number of workers."""
    size = max(ROWS_AT_ONCE // pattern.m, 1) * pattern.m
    return [slice(start, start + size) for start in range(0, rows, size)]


class Shared:
    """What the rows of one layer have in common, such as a factor of its gram matrix: made by whoever asks first."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made now if nobody made it yet; it must not depend on the rows that ask."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]


@dataclass(frozen=True, eq=False)
class Problem:
    """Some rows of one layer; rows come in whole blocks, so that a transposable mask is the same for any split.

    Attributes:
        objective: of these rows, centred if the bias will follow.
        weight: (O, K) float64, the current weights; zeros of an unstructured checkpoint included.
        pattern: the rule.
        solver: of the masks.
        shared: by all rows of the layer.
        choose_damping: asked once, if a method wants it; must not depend on the rows. `None` = `DAMPING`.
    """

    objective: Objective
    weight: Tensor
    pattern: Pattern
    solver: Solver = "exact"
    shared: Shared = field(default_factory=Shared)
    choose_damping: Callable[[], float] | None = None

    def rows(self, part: slice) -> "Problem":
        """The problem of some of the outputs."""
        return replace(self, objective=self.objective.rows(part), weight=self.weight[part])

    @property
    def damping(self) -> float:
        """How much of the mean diagonal of the gram matrix to add to it, at first."""
        choose = self.choose_damping
        if choose is None:
            return DAMPING
        return float(self.shared.get("damping", lambda: torch.tensor(choose(), dtype=torch.float64)))

    def project(self, matrix: Tensor, importance: Tensor | None = None) -> Tensor:
        """The mask of the pattern that keeps the most of a matrix.

        Args:
            matrix: (O, K), any float dtype.
            importance: (O, K), not negative; what to keep the most of in place of abs(matrix).

        Returns:
            (O, K) bool.
        """
        return solve(matrix, self.pattern, self.solver, importance)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a method returns.

    Attributes:
        weight: (O, K) float64, zero wherever the mask is `False`.
        mask: (O, K) bool, `True` = kept; holds the pattern.
        damping: what was added to the diagonal of the gram matrix, relative to its mean; 0 for methods that add none.
        iterations: steps taken by an iterative method; 0 for the others.
    """

    weight: Tensor
    mask: Tensor
    damping: float = 0.0
    iterations: int = 0


Method = Callable[[Sequence[Problem], Group], list[Solution]]
"""A conversion method: the rows of a layer in parts, whose work the group's threads may share.

It depends on nothing but the problem: the same rows give the same bits on any worker.
"""


def part_by_part(solve_rows: Callable[[Problem], Solution]) -> Method:
    """The method that solves each part for itself."""
    return lambda parts, group: group.each(solve_rows, parts)
