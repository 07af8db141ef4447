"""The N:M rule: how many weights are kept, in how many, and in which directions."""

import re
from dataclasses import dataclass
from functools import total_ordering

_TEXT = re.compile(r"(\d+):(\d+)(-T)?")
_MAX_M = 32


class PatternError(ValueError):
    """A pattern that cannot exist, such as ``5:4``."""


@total_ordering
@dataclass(frozen=True)
class Pattern:
    """N weights kept in every M consecutive ones along the reduction axis.

    Attributes:
        n: weights **kept** in each group. The 2021 paper and some libraries count zeros instead.
        m: weights in a group, at most 32.
        transposable: also at most N kept in every M along the output axis: W and W^T both hold N:M.

    Raises:
        PatternError: unless 1 <= n < m <= 32.
    """

    n: int
    m: int
    transposable: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= _MAX_M:
            raise PatternError(
                f"pattern {self} is impossible: N of N:M is the number of weights kept, "
                f"so 1 <= N < M <= {_MAX_M}; use 2:4, 2:4-T, 4:8 or 4:8-T"
            )

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read the text form, ``2:4`` or ``2:4-T``.

        Raises:
            PatternError: the text has another form or names an impossible pattern.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise PatternError(f"cannot read pattern {text!r}: write N:M or N:M-T, for example 2:4-T")
        return cls(int(match[1]), int(match[2]), match[3] is not None)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{'-T' if self.transposable else ''}"

    def __lt__(self, other: "Pattern") -> bool:
        return (self.m, self.n, self.transposable) < (other.m, other.n, other.transposable)

    @property
    def density(self) -> float:
        """Fraction of weights kept when every group is full."""
        return self.n / self.m
