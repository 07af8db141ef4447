"""Lines and tables for people: as wide as their window, wide where there is none, and no name is cut."""

from collections.abc import Collection

from rich.console import Console
from rich.table import Column, Table

_WIDE = 180  # characters, where nobody's window says


def new_console() -> Console:
    """Of stdout; prints what it is given and changes nothing of it."""
    return widened(Console(soft_wrap=True, highlight=False, markup=False, emoji=False))


def widened(console: Console) -> Console:
    """The same, wide if it writes to a pipe or a log."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    return console


def new_table(*titles: str, right: Collection[str] = ()) -> Table:
    """An empty table, in which what finds no room goes on in the next line.

    Args:
        titles: of the columns.
        right: those whose cells end at the right.
    """
    return Table(*(Column(title, overflow="fold", justify="right" if title in right else "left") for title in titles))
