import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs
from safetensors.torch import save_file

from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.pipeline.config import load_config
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.report import render
from tnm_pipeline.pipeline.report.alternatives import Alternative, Alternatives, alternatives
from tnm_pipeline.pipeline.report.data import read_run
from tnm_pipeline.pipeline.report.figures import accuracy_figure, alternatives_figure, curves_figure, mask_pictures
from tnm_pipeline.pipeline.report.verdict import remarks, verdict
from tnm_pipeline.training.pattern import Pattern

RUN = Path(__file__).parent / "data" / "report"  # results of a real run on digits, curves and mask corner trimmed
ALL = ("dense", "train", "convert", "prune", "convert-unstructured", "best", "export", "build", "verify")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with every stage's result and no cache records."""
    target = tmp_path / "run"
    for stage in ALL:
        target.joinpath(stage).mkdir(parents=True)
        shutil.copyfile(RUN / f"{stage}.json", target / stage / "result.json")
    target.joinpath("config.toml").write_text(_config(target), encoding="utf-8")
    return target


class Page(HTMLParser):
    """What a browser would find: attributes, the text that a person reads, scripts by type."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.scripts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif "style" not in self.open:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def test_a_whole_run_is_one_file_that_asks_for_nothing(folder: Path) -> None:
    page = Page(render(folder))
    loads = [(tag, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert loads == [("link", "data:,")]
    assert sum(get_plotlyjs()[:200] in text for _, text in page.scripts) == 1
    assert "@import" not in (content := (folder / "report.html").read_text(encoding="utf-8"))
    assert "url(" not in content.split("</style>")[0]
    for heading in ("Accuracy", "Training curves", "transpose", "Layer by layer", "Artifacts", "Latency", "made"):
        assert heading in page.words


def test_the_same_folder_gives_the_same_bytes_and_leaves_no_temporary_file(folder: Path) -> None:
    first = render(folder).read_bytes()
    assert render(folder).read_bytes() == first
    assert sorted(path.name for path in folder.glob("report*")) == ["report.html"]


def test_plotlys_own_script_cannot_end_its_element() -> None:
    script = get_plotlyjs().lower()
    assert "</script" not in script
    assert "<!--" not in script


def test_figures_are_what_plotly_knows(folder: Path) -> None:
    run = read_run(folder)
    for figure in (accuracy_figure(run.scores, run.samples), accuracy_figure(run.scores, None)):
        go.Figure(figure)  # refuses unknown attributes and wrong values
    go.Figure(curves_figure(run.curves))


def test_names_of_users_are_text(folder: Path) -> None:
    evil = "<script>alert(1)</script>"
    for stage in ("train", "export"):
        path = folder / stage / "result.json"
        # layer 3 everywhere, as a user's module dict could call it
        path.write_text(path.read_text().replace('"name": "3"', f'"name": "{evil}"'), encoding="utf-8")
    _edit(folder, "train", lambda result: result["picture"].update(layer=evil))
    _edit(folder, "train", lambda result: result["skipped"].update({"0": "</td><img src=x onerror=alert(1)>"}))
    _edit(folder, "verify", lambda result: result["latency"].update(tensorrt={"not_measured": "</p><b>&"}))
    save_file({f"{evil}.weight": torch.ones(8, 8)}, folder / "dense" / "model.safetensors")
    page = Page(render(folder))
    assert page.words.count(evil) == 3  # above the mask, in the table of layers and in the one of other patterns
    assert f"{evil}50.0%50.0%50.0%50.0%" in page.words
    assert "</td><img src=x onerror=alert(1)>" in page.words
    assert "img" not in {tag for tag, _, _ in page.attributes}
    assert not any(text.startswith("alert") for _, text in page.scripts)


def test_json_in_script_elements_cannot_close_them(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("digits-cnn", "</script><script>alert(2)//"), encoding="utf-8")
    figures = [text for kind, text in Page(render(folder)).scripts if kind == "application/json"]
    assert len(figures) == 2
    for text in figures:
        assert "<" not in text
        json.loads(text)


def test_a_diverged_training_is_a_gap_not_broken_json(folder: Path) -> None:
    _edit(folder, "train", lambda result: result["history"].update(loss=[[22, 1.0], [44, float("nan")]]))
    figures = [json.loads(text) for kind, text in Page(render(folder)).scripts if kind == "application/json"]
    assert [1.0, None] in [trace["y"] for figure in figures for trace in figure["data"]]


@pytest.mark.parametrize("count", range(len(ALL) + 1))
def test_every_prefix_of_a_run_renders(folder: Path, count: int) -> None:
    _keep(folder, ALL[:count])
    page = Page(render(folder))
    assert ("was not run; the command at the end runs it" in page.words) == (count < len(ALL))
    assert f"tnm-pipeline run --config {folder / 'config.toml'}" in page.words


def test_nothing_yet(folder: Path) -> None:
    _keep(folder, ())
    page = Page(render(folder))
    assert "Nothing was trained, converted or exported yet." in page.words
    assert not page.scripts


def test_only_training(folder: Path) -> None:
    _keep(folder, ("dense", "train"))
    text = verdict(read_run(folder))
    assert text.startswith("2:4-T kept 94.4% against 94.2% dense (+0.2 points); ")
    assert "3 layers hold the pattern in both directions in the checkpoint, not exported yet" in text
    assert text.endswith("latency was not measured yet.")


def test_a_given_checkpoint_has_no_twin(folder: Path) -> None:
    _keep(folder, ("best", "export", "verify"))
    text = _config(folder, "export.checkpoint=given.safetensors", "trt.enabled=false")
    folder.joinpath("config.toml").write_text(text, encoding="utf-8")
    _edit(folder, "best", lambda result: result.update(route="given", candidates={}))
    _edit(folder, "verify", lambda result: (result.update(latency={}, plan=None), result["accuracy"].pop("dense")))
    run = read_run(folder)
    assert verdict(run).startswith("The given 2:4-T checkpoint scores 94.4%, with no dense twin to compare it with")
    assert "no dense twin to time it against" in verdict(run)
    words = Page(render(folder)).words
    assert "does not ask for the stage build" in words
    assert "The checkpoint was given" in words


def test_stages_that_the_configuration_does_not_ask_for_are_not_shown(folder: Path) -> None:
    folder.joinpath("config.toml").write_text(_config(folder, 'run.routes=["train"]'), encoding="utf-8")
    labels = [score.label for score in read_run(folder).scores]
    assert not any("converted" in label for label in labels)


def test_verdict_without_a_gpu(folder: Path) -> None:
    text = verdict(read_run(folder))
    assert "2:4-T kept 94.4% against 94.2% dense (+0.2 points, 1 of 450 test samples)" in text
    assert "3 layers hold the pattern in both directions in the ONNX file" in text
    assert "ONNX Runtime CPU is unchanged (0.99x the dense time" in text
    assert "because ONNX Runtime has no sparse kernels" in text
    assert text.endswith("no GPU here, so TensorRT latency was not measured.")


def test_a_ratio_off_one_is_not_called_a_gain(folder: Path) -> None:
    _edit(folder, "verify", lambda result: result["latency"]["onnxruntime"]["rows"][1].update(ratio_high=0.98))
    assert "which is no gain from sparsity: ONNX Runtime has no sparse kernels" in verdict(read_run(folder))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.80, 0.90, "the sparse plan is faster"),
        (0.95, 1.05, "sparsity is not worth it"),
        (1.10, 1.20, "the sparse plan is slower"),
    ],
)
def test_verdict_on_a_gpu(folder: Path, low: float, high: float, words: str) -> None:
    def time_on_gpu(result: dict[str, Any]) -> None:
        table = json.loads(json.dumps(result["latency"]["onnxruntime"]))
        table["environment"]["gpus"] = result["latency"]["onnxruntime"]["environment"]["gpus"] = ["NVIDIA H200"]
        table["rows"][1] |= {"ratio_low": low, "ratio_high": high, "ratio": (low + high) / 2}
        result["latency"]["tensorrt"] = table | {"backend": "tensorrt"}

    _edit(folder, "verify", time_on_gpu)
    text = verdict(read_run(folder))
    assert f"with TensorRT on NVIDIA H200 {words}" in text
    assert "CPU" not in text
    render(folder)


def test_identical_plans_prove_only_that_the_flag_was_accepted(folder: Path) -> None:
    notes = " ".join(remarks(read_run(folder)))
    assert "byte-identical" in notes
    assert "proves that the flag was accepted and nothing more" in notes
    assert "the builder did not say whether it picked any" in notes
    _edit(folder, "build", lambda result: result.update(identical=False))
    assert "byte-identical" not in " ".join(remarks(read_run(folder)))


def test_a_violation_is_the_first_thing_said(folder: Path) -> None:
    def break_layer(result: dict[str, Any]) -> None:
        for file in result["files"]:
            file["sparsity"]["per_layer"][1].update(violations_transposed=5)

    _edit(folder, "export", break_layer)
    run = read_run(folder)
    assert "1 of 3 layers breaks the pattern in the ONNX file" in verdict(run)
    assert "Layer 3 should hold 2:4-T, but 0 groups of W and 5 groups of its transpose break it." in next(remarks(run))
    assert '<span class="bad">5</span>' in render(folder).read_text(encoding="utf-8")


def test_a_verification_that_failed_says_so(folder: Path) -> None:
    _keep(folder, ALL[:-1])
    folder.joinpath(".cache").mkdir()
    folder.joinpath(".cache", "verify.started").touch()
    assert "Verification started and did not finish" in " ".join(remarks(read_run(folder)))
    _edit(folder, "best", lambda result: result.update(accuracy=0.9))
    run = read_run(folder)
    assert verdict(run).startswith("2:4-T fell to 90.0% from 94.2% dense (-4.2 points; at most -2 was allowed)")
    assert "the stage verify started and did not finish" in Page(render(folder)).words


def test_a_gate_that_refuses_is_named_first(folder: Path) -> None:
    _edit(folder, "verify", lambda result: result["accuracy"].update({"onnx fp32": 0.9}))
    run = read_run(folder)
    assert next(remarks(run)).startswith("Refused: the sparse model is 4.22 points below dense")
    assert "raise verify.max_drop" in Page(render(folder)).words


def test_results_of_other_code_are_outdated(folder: Path) -> None:
    folder.joinpath(".cache").mkdir()
    record = {"key": "of another version", "outputs": {}, "seconds": 12.5}
    folder.joinpath(".cache", "dense.json").write_text(json.dumps(record), encoding="utf-8")
    run = read_run(folder)
    assert run.state("dense") == "outdated"
    assert run.state("train") == "done"
    assert next(remarks(run)).startswith("Outdated: dense. ")
    assert "12.5 s" in Page(render(folder)).words


def test_a_converted_route_shows_its_errors(folder: Path) -> None:
    assert "masked → solved" not in Page(render(folder)).words
    _edit(folder, "best", lambda result: result.update(route="convert"))
    layers = {layer.name: layer for layer in read_run(folder).layers}
    assert (layers["3"].type, layers["3"].shape, layers["3"].pattern) == ("Conv2d", (8, 8, 3, 3), "2:4-T")
    assert layers["3"].error_masked is not None
    assert layers["3"].error is not None
    assert layers["3"].error < layers["3"].error_masked
    assert layers["12"].error is None
    assert layers["12"].why_not == "last layer, kept dense (keep_last = true)"
    assert "masked → solved" in Page(render(folder)).words


def test_a_conversion_that_is_not_exported_does_not_claim_both_directions(folder: Path) -> None:
    _keep(folder, ("dense", "convert"))
    run = read_run(folder)
    assert [layer.holds for layer in run.layers] == [None, None, None, None, None]
    assert "3 layers should hold the pattern, which nobody has counted in both directions yet" in verdict(run)


@pytest.mark.parametrize(
    ("picked", "word"),
    [(None, "the builder did not say"), (0, "no"), (3, "yes"), (2, "2 of 3, not named")],
)
def test_picked_is_what_the_builder_said(folder: Path, picked: int | None, word: str) -> None:
    _edit(folder, "build", lambda result: result["plans"][0].update(picked_layers=picked))
    assert [layer.picked for layer in read_run(folder).layers] == ["", word, word, word, ""]


def test_mask_pictures_outline_the_groups_that_break_the_pattern() -> None:
    # Each row keeps two of four; the first two columns keep three.
    rows = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    straight, transposed = mask_pictures(rows, Pattern(2, 4))
    assert (straight.violations, straight.broken) == (0, "")
    assert (transposed.violations, transposed.broken) == (2, "M0 0h4v1h-4zM0 1h4v1h-4z")
    assert straight.kept.count("M") == 8


def test_other_patterns_are_solved_on_the_weights_that_the_run_started_from(folder: Path) -> None:
    assert alternatives(read_run(folder)) is None  # results without weights
    _save_weights(folder, "dense")
    found = alternatives(read_run(folder))
    assert found is not None
    assert (found.source, found.own) == ("dense/model.safetensors", "2:4-T")
    assert found.patterns == ("2:4", "2:4-T", "4:8", "4:8-T")
    assert list(found.table) == ["3", "10"]  # sparse, and in the checkpoint
    assert list(found.table["3"]) == ["2:4", "2:4-T"]  # 8 does not divide its 4 inputs
    # Two rows of W have three weights and lose one each; no column has more than two.
    assert found.table["3"]["2:4"] == Alternative("3", "2:4", kept_magnitude=6 / 8, violated=2 / 4)
    assert found.table["3"]["2:4-T"] == Alternative("3", "2:4-T", kept_magnitude=6 / 8, violated=2 / 8)
    assert {name: (row.kept_magnitude, row.violated) for name, row in found.table["10"].items()} == {
        "2:4": (0.5, 1.0),
        "2:4-T": (0.5, 1.0),
        "4:8": (0.5, 1.0),
        "4:8-T": (0.5, 1.0),
    }


def test_a_route_from_the_unstructured_checkpoint_is_compared_with_that(folder: Path) -> None:
    _save_weights(folder, "dense")
    _edit(folder, "best", lambda result: result.update(route="convert-unstructured"))
    assert alternatives(read_run(folder)) is None
    _save_weights(folder, "prune")
    found = alternatives(read_run(folder))
    assert found is not None
    assert found.source == "prune/model.safetensors"


def test_the_runs_own_pattern_is_among_the_others(folder: Path) -> None:
    folder.joinpath("config.toml").write_text(_config(folder, "sparsity.pattern=1:4-T"), encoding="utf-8")
    _save_weights(folder, "dense")
    found = alternatives(read_run(folder))
    assert found is not None
    assert (found.own, found.patterns) == ("1:4-T", ("1:4-T", "2:4", "2:4-T", "4:8", "4:8-T"))
    figure = alternatives_figure(found)
    go.Figure(figure)  # refuses unknown attributes and wrong values
    legend = sorted(figure["data"], key=lambda trace: int(trace["legendrank"]))
    assert [trace["name"] for trace in legend] == ["1:4-T, this run's", "2:4", "2:4-T", "4:8", "4:8-T"]
    assert len({trace["marker"]["color"] for trace in figure["data"]}) == 3


def test_other_patterns_are_solved_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_weights(folder, "dense")
    first = render(folder).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("tnm_pipeline.pipeline.what_if.outcome", lambda *_: pytest.fail("solved again"))
        assert render(folder).read_bytes() == first
    record = folder / ".cache" / "alternatives.json"
    record.write_text(record.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert render(folder).read_bytes() == first
    save_file({"3.weight": torch.eye(4), "10.weight": torch.eye(8)}, folder / "dense" / "model.safetensors")
    found = alternatives(read_run(folder))
    assert found is not None
    assert {row.kept_magnitude for row in found.rows} == {1.0}


def test_the_figure_of_other_patterns_says_what_it_shows(folder: Path) -> None:
    assert "What other patterns would keep" not in Page(render(folder)).words
    _save_weights(folder, "dense")
    page = Page(render(folder))
    assert "the weights in dense/model.safetensors, as they were before any mask" in page.words
    assert "computed for this page, by the exact solver" in page.words
    assert ("div", "data-figure", "alternatives") in page.attributes
    table = (folder / "report.html").read_text(encoding="utf-8").split('id="alternatives"')[1].split("</section>")[0]
    assert re.findall(r'<td class="n">(?:<span[^>]*>)?([^<]+)', table)[2:] == ["\u2013", "\u2013", *["50.0%"] * 4]
    assert re.findall(r"<td><code>([^<]+)", table) == ["3", "10"]


def test_dots_of_other_patterns_are_where_the_numbers_are() -> None:
    evil = "<b>&amp;</b>"
    rows = (
        Alternative("a", "2:4", 0.8, 0.25),
        Alternative(evil, "2:4", 0.7, 1.0),
        Alternative(evil, "2:4-T", 0.6, 1.0),
    )
    figure = alternatives_figure(Alternatives("dense/model.safetensors", "2:4", ("2:4", "2:4-T"), rows))
    go.Figure(figure)
    transposable, straight = figure["data"]
    assert (straight["x"], straight["y"], straight["customdata"]) == ([80.0, 70.0], [0, 1], [0.25, 1.0])
    assert (transposable["x"], transposable["y"]) == ([60.0], [1])
    assert straight["marker"]["size"] > transposable["marker"]["size"]
    # plotly reads texts as HTML: names of users are escaped wherever it shows them
    escaped = "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["a", escaped]
    assert straight["text"] == ["a", escaped]


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        render(tmp_path)


def test_broken_result_is_refused_with_the_way_out(folder: Path) -> None:
    folder.joinpath("train", "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactRejected, match="run the same command again"):
        render(folder)


def test_rendering_needs_no_heavy_package() -> None:
    code = "import sys, tnm_pipeline.pipeline.report; print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def _config(folder: Path, *overrides: str) -> str:
    return load_config(RUN / "config.toml", overrides, {"run.folder": str(folder)}).to_toml()


def _edit(folder: Path, stage: str, change: Any) -> None:
    path = folder / stage / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")


def _save_weights(folder: Path, stage: str) -> None:
    """Layer 3 with three equal weights in two of its four rows, two in each column; layer 10 of ones."""
    three = torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    save_file({"3.weight": three, "10.weight": torch.ones(8, 8)}, folder / stage / "model.safetensors")


def _keep(folder: Path, stages: tuple[str, ...]) -> None:
    for stage in ALL:
        if stage not in stages:
            shutil.rmtree(folder / stage)
