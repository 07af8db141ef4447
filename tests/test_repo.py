"""The repository itself: imports, packaging, the README's commands and links."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "training", "export", "engines")
MAY_IMPORT = {
    "training": {"training"},
    "engines": {"engines"},
    "export": {"export", "training", "engines"},
    "pipeline": {"pipeline", "export", "training", "engines"},
}
DOCUMENTS = [
    path for path in ROOT.rglob("*.md") if not {".venv", "runs", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package they reach"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.startswith("tnm_pipeline."):
                assert name.split(".")[1] in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_engines_never_import_torch() -> None:
    for path in (ROOT / "engines").rglob("*.py"):
        assert not {name for name in imported_modules(path) if name.split(".")[0] == "torch"}, path


def test_training_imports_where_pydantic_is_not_installed() -> None:
    for path in (ROOT / "training").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"pydantic", "rich", "typer"}, path


def test_the_package_list_is_what_is_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    on_disk = {
        ".".join(("tnm_pipeline", *path.parent.relative_to(ROOT).parts))
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == on_disk
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert (ROOT / "typings" / "tnm_pipeline" / package).resolve() == ROOT / package


def test_the_package_data_is_what_is_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = {
        path
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
        if package != "*"
    }
    kinds = (".toml", ".j2", ".css", ".js")
    assert {path for path in (ROOT / "pipeline").rglob("*") if path.suffix in kinds} == listed


def commands_in(document: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {line.split()[1] for document in DOCUMENTS for line in commands_in(document) if line.startswith("make ")}
    assert named
    assert named <= targets


def test_every_command_line_that_a_document_names_parses() -> None:
    """Commands and options are looked up in the real command line; paths are not opened."""
    from typer.main import get_command

    from tnm_pipeline.pipeline.cli import app

    group = get_command(app)
    lines = {line for document in DOCUMENTS for line in commands_in(document) if line.startswith("tnm-pipeline ")}
    assert lines
    for line in sorted(lines):
        words = line.split()[1:]
        if words[0].startswith("-"):
            continue
        command: Any = group
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.split("=")[0] for word in words if word.startswith("-")}
        assert used <= known, line


def test_every_script_that_a_document_names_exists() -> None:
    for document in DOCUMENTS:
        for line in commands_in(document):
            for word in line.split():
                if word.startswith("scripts/"):
                    assert (ROOT / word).is_file(), f"{document.name}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_importing_the_command_line_stays_light() -> None:
    """What makes --help quick: nothing heavy is imported before a command needs it."""
    code = "import sys, tnm_pipeline.pipeline.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pydantic", "plotly", "sklearn"}
    assert not heavy & set(done.stdout.split())


def test_the_guide_shows_the_defaults() -> None:
    from tnm_pipeline.pipeline.config import Config

    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(\[run\].*?)```", guide, flags=re.DOTALL)
    assert block is not None
    shown = tomllib.loads(block[1])
    assert Config.model_validate(shown) == Config()
    for name, section in Config().model_dump(exclude_none=True).items():
        assert {key for key, value in section.items() if value not in ({}, "")} <= shown.get(name, {}).keys()
