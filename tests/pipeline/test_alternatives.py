"""What other patterns would keep: solved once, on the weights that the run started from."""

import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from safetensors.torch import save_file

from tests.pipeline.reports import Page, config_text, edit, save_weights
from tnm_pipeline.pipeline.report import render
from tnm_pipeline.pipeline.report.alternatives import Alternative, Alternatives, alternatives
from tnm_pipeline.pipeline.report.data import read_run
from tnm_pipeline.pipeline.report.figures import alternatives_figure


def test_other_patterns_are_solved_on_the_weights_that_the_run_started_from(folder: Path) -> None:
    assert alternatives(read_run(folder)) is None  # results without weights
    save_weights(folder, "dense")
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
    save_weights(folder, "dense")
    edit(folder, "best", lambda result: result.update(route="convert-unstructured"))
    assert alternatives(read_run(folder)) is None
    save_weights(folder, "prune")
    found = alternatives(read_run(folder))
    assert found is not None
    assert found.source == "prune/model.safetensors"


def test_the_runs_own_pattern_is_among_the_others(folder: Path) -> None:
    folder.joinpath("config.toml").write_text(config_text(folder, "sparsity.pattern=1:4-T"), encoding="utf-8")
    save_weights(folder, "dense")
    found = alternatives(read_run(folder))
    assert found is not None
    assert (found.own, found.patterns) == ("1:4-T", ("1:4-T", "2:4", "2:4-T", "4:8", "4:8-T"))
    figure = alternatives_figure(found)
    go.Figure(figure)  # refuses unknown attributes and wrong values
    legend = sorted(figure["data"], key=lambda trace: int(trace["legendrank"]))
    assert [trace["name"] for trace in legend] == ["1:4-T, this run's", "2:4", "2:4-T", "4:8", "4:8-T"]
    assert len({trace["marker"]["color"] for trace in figure["data"]}) == 3


def test_other_patterns_are_solved_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(folder, "dense")
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
    save_weights(folder, "dense")
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
