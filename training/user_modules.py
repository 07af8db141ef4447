"""Modules of the user: looked for in the current folder too, after everything that is installed.

After, so that a file that happens to lie beside a downloaded model cannot stand in for a library.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import a module by its dotted name.

    Args:
        name: such as `mymodels` or `mypackage.models`.

    Raises:
        ImportError: there is none, or it cannot be imported.
    """
    _look_here_too()
    return importlib.import_module(name)


def files_behind(name: str) -> list[Path]:
    """The source files that a module probably depends on: those of its package, or those beside it.

    Imports nothing: the user's own code may do anything, and whether it is trusted is not known yet.

    Args:
        name: dotted name.

    Returns:
        Sorted paths; empty when there is no such module, or none with a source file.
    """
    _look_here_too()
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except ValueError:  # an empty name, or a module that is loaded and has no spec
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))
    return sorted(Path(spec.origin).parent.glob("*.py")) if spec.has_location and spec.origin else []


def _look_here_too() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
