"""Which files a user's module depends on."""

from pathlib import Path

import pytest

from tnm_pipeline.training.user_modules import files_behind


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that import each other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = {
        "user_net": "import os\nimport user_blocks.attention as attention\nfrom user_parts import part\n",
        "user_parts": "def late():\n    import user_net\n    import user_broken\n",
        "user_broken": "def (",
        "user_plot": "import user_net\n",
        "user_blocks/__init__": "",
        "user_blocks/attention": "",
    }
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


def test_a_module_depends_on_what_it_imports_beside_it(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in files_behind("user_net")]
    used = ["user_blocks/__init__.py", "user_blocks/attention.py", "user_broken.py", "user_net.py", "user_parts.py"]
    assert names == used  # not on a script that uses it


def test_a_package_depends_on_all_of_its_files(folder: Path) -> None:
    assert len(files_behind("user_blocks.attention")) == 2


@pytest.mark.usefixtures("folder")
def test_an_installed_module_is_one_file() -> None:
    assert [path.name for path in files_behind("typing_extensions")] == ["typing_extensions.py"]


@pytest.mark.parametrize("name", ["", "no_such_module", "sys"])
def test_without_sources_there_are_none(name: str) -> None:
    assert files_behind(name) == []
