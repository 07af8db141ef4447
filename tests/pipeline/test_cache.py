"""The run folder: what makes a stage run again, what does not, and whose files are never touched."""

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tnm_pipeline.pipeline.cache import DATA, HUB, JOURNAL, MODELS, STATE_FILE, StageCache, locked, source_fingerprint
from tnm_pipeline.pipeline.errors import ConfigError, RunLocked


@pytest.fixture
def cache(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path)


def finish(cache: StageCache, key: str = "key") -> Path:
    """A stage that wrote two files, one of them in a folder."""
    target = cache.begin("stage", key)
    (target / "sub").mkdir()
    (target / "sub/deep.txt").write_text("deep")
    (target / "result.json").write_text("{}")
    cache.finish("stage", key, time.monotonic())
    return target


def test_a_key_depends_on_name_settings_and_content_and_on_no_path(cache: StageCache, tmp_path: Path) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    one.write_bytes(b"1")
    same.write_bytes(b"1")
    other.write_bytes(b"2")
    key = cache.key("stage", {"a": 1, "b": 2}, {"in": one})
    assert cache.key("stage", {"b": 2, "a": 1}, {"in": same}) == key
    assert StageCache(tmp_path / "elsewhere").key("stage", {"a": 1, "b": 2}, {"in": one}) == key
    changed = [
        cache.key("other", {"a": 1, "b": 2}, {"in": one}),
        cache.key("stage", {"a": 1, "b": 3}, {"in": one}),
        cache.key("stage", {"a": 1, "b": 2}, {"in": other}),
        cache.key("stage", {"a": 1, "b": 2}, {"else": one}),
    ]
    assert len({key, *changed}) == 5


def test_a_finished_stage_is_found_by_its_key_alone(cache: StageCache) -> None:
    finish(cache)
    record = cache.find("stage", "key")
    assert record is not None
    assert sorted(record.outputs) == ["result.json", "sub/deep.txt"]
    assert cache.find("stage", "other key") is None
    assert cache.find("other stage", "key") is None


@pytest.mark.parametrize("change", ["edit", "delete"])
def test_a_changed_output_is_not_found(cache: StageCache, change: str) -> None:
    victim = finish(cache) / "sub/deep.txt"
    victim.write_text("deeq") if change == "edit" else victim.unlink()
    assert cache.find("stage", "key") is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff\xfe", b"{}", b"null", b'{"key": "key", "outputs": {}}'),
        b'{"key": "key", "outputs": [1], "seconds": 1}',
        b'{"key": "key", "outputs": {}, "seconds": "x"}',
    ],
)
def test_a_corrupt_record_means_do_it_again(cache: StageCache, tmp_path: Path, content: bytes) -> None:
    target = finish(cache)
    (tmp_path / ".cache/stage.json").write_bytes(content)
    assert cache.find("stage", "key") is None
    cache.begin("stage", "key")
    assert not list(target.iterdir())


def test_the_state_of_an_interrupted_training_stays_for_the_same_key_only(cache: StageCache) -> None:
    target = cache.begin("stage", "key")
    for name in (STATE_FILE, "half.bin"):
        (target / name).write_text("x")
    cache.begin("stage", "key")
    assert [path.name for path in target.iterdir()] == [STATE_FILE]
    cache.begin("stage", "other key")
    assert not list(target.iterdir())


def test_the_journal_of_an_interrupted_conversion_stays_for_the_same_key_only(cache: StageCache) -> None:
    for key, stays in (("key", True), ("other key", False)):
        layer = cache.begin("stage", "key") / JOURNAL / "layer.safetensors"
        layer.parent.mkdir(exist_ok=True)
        layer.write_text("x")
        cache.begin("stage", key)
        assert layer.exists() == stays


def test_files_that_no_run_made_are_left_alone(cache: StageCache, tmp_path: Path) -> None:
    """As with --folder . in a project that has a folder `train` of its own."""
    mine = tmp_path / "stage/mine.py"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(ConfigError, match="--folder"):
        cache.refuse_foreign_files("stage")
    assert mine.read_text() == "precious"
    assert not (tmp_path / ".cache").exists()


def test_a_kill_while_clearing_leaves_a_folder_that_is_still_ours(
    cache: StageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = finish(cache)

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            cache.begin("stage", "other key")
    assert (target / "sub").exists()
    assert cache.find("stage", "key") is None
    cache.refuse_foreign_files("stage")
    cache.begin("stage", "other key")
    assert not list(target.iterdir())


def test_the_lock_names_its_owner_and_is_free_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "ä run"
    with locked(folder), pytest.raises(RunLocked, match=f"process {os.getpid()} on"), locked(folder):
        pass
    with locked(folder):
        assert not FileLock(folder / ".lock").is_locked


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="choose another folder with --folder"), locked(tmp_path / folder):
        pass


def test_an_error_inside_is_not_taken_for_one_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), locked(tmp_path):
        raise PermissionError(13, "denied", str(tmp_path / "train/model.safetensors"))


def test_a_source_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("def f(): return 1")
    (tmp_path / "data.npz").write_bytes(b"1")
    model, data = source_fingerprint("mine:f"), source_fingerprint("data.npz")
    assert source_fingerprint("mine:f") == model
    (tmp_path / "mine.py").write_text("def f(): return 2")
    (tmp_path / "data.npz").write_bytes(b"2")
    assert source_fingerprint("mine:f") != model
    assert source_fingerprint("data.npz") != data
    assert source_fingerprint("digits") == "digits"


def test_a_folder_is_known_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/one").write_bytes(b"1")
    known = {source_fingerprint(str(folder)), source_fingerprint(f"hf:{folder}")}
    assert len(known) == 1
    (folder / ".hidden").write_bytes(b"2")
    assert source_fingerprint(str(folder)) in known
    for change in (lambda: (folder / "two").write_bytes(b"2"), lambda: (folder / "two").rename(folder / "sub/two")):
        change()
        assert source_fingerprint(str(folder)) not in known
        known.add(source_fingerprint(str(folder)))


def test_a_built_in_name_wins_over_a_folder_where_it_does_so_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tnm_pipeline.training import sources

    assert (set(MODELS), set(DATA)) == (set(sources.MODELS), set(sources.DATA))
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-mlp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1")
    assert source_fingerprint("digits", DATA) == "digits"
    assert source_fingerprint("digits-mlp", DATA) != "digits-mlp"  # a folder of images


def test_a_name_on_the_hub_is_no_module_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tnm_pipeline.training import sources

    assert HUB == sources.HUB
    (tmp_path / "hf.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_fingerprint("hf:some/model") == "hf:some/model"


@pytest.mark.parametrize("source", ["absent:f", "absent.below:f", ":f", "absent.npz", ""])
def test_a_source_that_cannot_be_found_is_no_error_yet(source: str) -> None:
    assert source_fingerprint(source) == source


def test_a_source_is_looked_at_without_importing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising").mkdir()
    (tmp_path / "raising/__init__.py").write_text("raise KeyError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_fingerprint("raising.below:f") != "raising.below:f"


def test_a_record_is_written_whole(cache: StageCache, tmp_path: Path) -> None:
    finish(cache)
    assert set(json.loads((tmp_path / ".cache/stage.json").read_text())) == {"key", "outputs", "seconds"}
    assert not (tmp_path / ".cache/stage.started").exists()
