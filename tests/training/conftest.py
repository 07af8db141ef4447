"""What tests of user code share."""

from pathlib import Path

import pytest


@pytest.fixture
def user_module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test file's USER_MODULE as a module in the current folder, which the command puts on the path; its name."""
    name = f"user_module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(request.module.USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return name
