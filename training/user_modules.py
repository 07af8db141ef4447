"""Modules of the user: looked for in the current folder too, after everything that is installed.

After, so that a file that happens to lie beside a downloaded model cannot stand in for a library.
"""

import ast
import importlib
import importlib.util
import sys
import sysconfig
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
    """The source files that a module probably depends on: those of its package, or of what it imports beside it.

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
    return sorted(_imported_beside(Path(spec.origin))) if spec.has_location and spec.origin else []


def _imported_beside(file: Path) -> set[Path]:
    """A file and those of the same folder, packages included, that it imports, directly or not."""
    root, found, waiting = file.parent, {file}, [file]
    if root in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        return found  # an installed library, among others
    while waiting:
        for name in _imports(waiting.pop()):
            own = [root / f"{name}.py", *(root / name).rglob("*.py")]
            new = {path for path in own if path.is_file()} - found
            found |= new
            waiting += new
    return found


def _imports(file: Path) -> set[str]:
    """Top-level names of what a file imports; none if it cannot be read, which importing it will say."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def _look_here_too() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
