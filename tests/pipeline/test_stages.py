"""The graph of stages: what each depends on, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tnm_pipeline.pipeline.config import load_config
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.stages import Stage, needed_for, stages_of

FOLDER = Path("run")


def stages(*overrides: str, folder: Path = FOLDER) -> dict[str, Stage]:
    given = ["model.source=digits-cnn", "data.source=digits", f"run.folder='{folder}'", *overrides]
    return stages_of(load_config(None, given), folder)


def changed(*overrides: str) -> set[str]:
    """The stages whose own settings an override changes; those after them follow by the content of their inputs."""
    before, after = stages(), stages(*overrides)
    return {name for name in before if before[name].settings != after[name].settings}


LEARNING = {"dense", "train", "prune", "convert", "convert-unstructured"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.save_every=7", set[str]()),
        ("verify.max_drop=50", set[str]()),
        ("verify.min_speedup=2", set[str]()),
        ("export.opset=19", {"export"}),
        ("verify.latency_rounds=20", {"verify"}),
        ("trt.batch=[1, 8, 32]", {"build"}),
        ("train.recipe=static", {"train"}),
        ("train.epochs=3", {"dense", "train"}),
        ("train.precision=bf16", {"dense", "train"}),
        ("train.backend=auto", {"train"}),
        ("train.teacher=0.5", {"train"}),
        ("train.start=converted", {"train"}),
        ("train.dense.epochs=3", {"dense"}),
        ("train.dense.lr=0.01", {"dense"}),
        ("convert.method=adaprune", {"convert", "convert-unstructured"}),
        ("convert.keep_first=false", {"convert", "convert-unstructured"}),
        ("calibration.source=x.npz", {"convert", "convert-unstructured"}),
        ("convert.workers=7", set[str]()),
        ("convert.unstructured=0.7", {"prune"}),
        ("sparsity.pattern=2:4", LEARNING - {"dense"}),
        ("model.args.channels=3", LEARNING | {"export", "verify"}),
    ],
)
def test_a_setting_reaches_the_stages_that_read_it(override: str, expected: set[str]) -> None:
    assert changed(override) == expected


@pytest.mark.parametrize(
    ("recipe", "starts_from_dense"), [("static", True), ("gradual", True), ("dynamic", False), ("paper", False)]
)
def test_some_recipes_start_from_the_dense_weights(recipe: str, starts_from_dense: bool) -> None:
    assert ("start" in stages(f"train.recipe={recipe}")["train"].inputs) is starts_from_dense


@pytest.mark.parametrize(
    ("start", "maker"), [("initial", None), ("dense", "dense"), ("converted", "convert"), (None, "dense")]
)
def test_a_training_starts_where_it_is_told_to_with_the_dense_baseline_as_its_teacher(
    start: str | None, maker: str | None
) -> None:
    told = ("run.routes=['train']", "train.recipe=static", "train.teacher=0.5")
    made = stages(*told, *([f"train.start={start}"] if start else []))
    weights = {"teacher": FOLDER / "dense" / "model.safetensors"}
    assert made["train"].inputs == weights | ({"start": FOLDER / maker / "model.safetensors"} if maker else {})
    assert ("convert" in made) is (maker == "convert")
    needed = [stage.name for stage in needed_for(made, FOLDER, {"train"})]
    assert needed == ["dense", *(["convert"] if maker == "convert" else []), "train"]


def test_a_conversion_that_a_training_starts_from_is_the_one_of_the_route() -> None:
    both = stages("run.routes=['train', 'convert']", "train.start=converted")
    alone = stages("run.routes=['train']", "train.start=converted")
    assert both["convert"] == alone["convert"]
    assert list(both) == list(alone) == ["dense", "convert", "train", "best", "export", "build", "verify"]
    assert "convert" in both["best"].inputs
    assert "convert" not in alone["best"].inputs


def test_the_folder_is_no_setting() -> None:
    here, there = stages(), stages(folder=Path("elsewhere"))
    for name, stage in here.items():
        assert stage.settings == there[name].settings
        relative = {label: path.relative_to(FOLDER) for label, path in stage.inputs.items()}
        assert relative == {label: path.relative_to("elsewhere") for label, path in there[name].inputs.items()}


def test_the_content_of_a_users_model_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "mine.py"
    source.write_text("def model(): ...")
    before = stages("model.source=mine:model")["dense"].settings
    source.write_text("def model(): ... # wider")
    assert stages("model.source=mine:model")["dense"].settings != before


def test_a_folder_of_the_name_of_something_built_in_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = stages("calibration.source=digits")
    for name in ("digits", "digits-cnn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    assert stages("calibration.source=digits") == before


def test_everything_comes_after_what_it_reads() -> None:
    for overrides in ((), ("train.recipe=static",), ("run.routes=['convert-unstructured']",), ("trt.enabled=false",)):
        graph = stages(*overrides)
        seen: set[str] = set()
        for name, stage in graph.items():
            assert {path.relative_to(FOLDER).parts[0] for path in stage.inputs.values()} <= seen
            seen.add(name)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"train"}, ["train"]),
        ({"convert"}, ["dense", "convert"]),
        ({"convert-unstructured"}, ["dense", "prune", "convert-unstructured"]),
        ({"train", "dense"}, ["dense", "train"]),
    ],
)
def test_only_what_a_target_needs_is_run(targets: set[str], expected: list[str]) -> None:
    assert [stage.name for stage in needed_for(stages(), FOLDER, targets)] == expected


def test_a_given_sparse_checkpoint_needs_no_learning() -> None:
    assert list(stages("export.checkpoint=mine.safetensors")) == ["best", "export", "build", "verify"]


def test_a_pruned_checkpoint_is_fitted_to_the_dense_one_or_to_what_is_given() -> None:
    converting = stages()["convert-unstructured"]
    assert converting.inputs["dense"] == FOLDER / "dense/model.safetensors"
    graph = stages("convert.reference=mine.pt")
    for name in ("convert", "convert-unstructured"):
        assert graph[name].inputs["reference"] == Path("mine.pt")
    assert "dense" not in graph["convert-unstructured"].inputs


@pytest.mark.parametrize("what", ["source", "tokenizer"])
def test_the_content_of_calibration_data_and_tokenizers_is_a_setting(tmp_path: Path, what: str) -> None:
    changing = tmp_path / "folder/sub"
    changing.mkdir(parents=True)
    (changing / "one").write_text("1")
    folder = {"source": str(changing.parent), "tokenizer": "x.txt"}[what]
    given = (f"calibration.source='{folder}'", f"calibration.args={{tokenizer = '{changing.parent}'}}")
    before = stages(*given)["convert"].settings
    assert stages(*given)["convert"].settings == before
    (changing / "one").write_text("2")
    assert stages(*given)["convert"].settings != before


def absolute(path: Path) -> str:
    return str(path.absolute())


def roundabout(path: Path) -> str:
    return f"../{Path.cwd().name}/{path}"


@pytest.mark.parametrize("spelled", [str, absolute, roundabout])
def test_a_checkpoint_that_the_run_would_clear_away_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: Callable[[Any], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = spelled(FOLDER / "dense/model.safetensors")
    graph = stages(f"model.checkpoint='{given}'")
    with pytest.raises(ConfigError, match="which this run writes anew"):
        needed_for(graph, FOLDER, {"convert"})
    graph = stages(f"export.checkpoint='{given}'")
    assert needed_for(graph, FOLDER, {"verify"})  # exporting writes nothing there
