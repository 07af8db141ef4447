"""The report: one page that says what was measured, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs
from safetensors.torch import save_file

from tests.pipeline.reports import ALL, Page, config_text, edit, keep
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.report import render
from tnm_pipeline.pipeline.report.data import read_run
from tnm_pipeline.pipeline.report.figures import curves_figure, mask_pictures, score_figure
from tnm_pipeline.pipeline.report.verdict import remarks, verdict
from tnm_pipeline.training.pattern import Pattern


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
    for figure in (score_figure(run.scores, run.metric, run.samples), score_figure(run.scores, run.metric, None)):
        go.Figure(figure)  # refuses unknown attributes and wrong values
    go.Figure(curves_figure(run.curves, run.metric))


def test_a_correlation_may_be_negative_and_has_no_interval_of_a_proportion(folder: Path) -> None:
    scores = {"train": 0.21, "convert": -0.3, "prune": 0.1, "convert-unstructured": 0.05, "dense": 0.28, "best": 0.21}
    for stage, score in scores.items():
        edit(folder, stage, lambda result, score=score: result.update(metric="spearman", spearman=score))
    for stage in ("train", "dense"):
        edit(folder, stage, lambda result: result["history"].update(spearman=result["history"]["accuracy"]))
    checked = {"torch": -0.02, "onnx fp32": -0.02, "onnx fp16": -0.02, "dense": 0.28}
    edit(folder, "verify", lambda result: result.update(metric="spearman", scores=checked))
    page = Page(render(folder))
    assert "Wilson" not in page.words
    figure = next(json.loads(text) for kind, text in page.scripts if kind == "application/json")
    assert "error_x" not in figure["data"][0]
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < -0.3
    assert high > 0.28


def test_names_of_users_are_text(folder: Path) -> None:
    evil = "<script>alert(1)</script>"
    for stage in ("train", "export"):
        path = folder / stage / "result.json"
        # layer 3 everywhere, as a user's module dict could call it
        path.write_text(path.read_text().replace('"name": "3"', f'"name": "{evil}"'), encoding="utf-8")
    edit(folder, "train", lambda result: result["picture"].update(layer=evil))
    edit(folder, "train", lambda result: result["skipped"].update({"0": "</td><img src=x onerror=alert(1)>"}))
    edit(folder, "verify", lambda result: result["latency"].update(tensorrt={"not_measured": "</p><b>&"}))
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
    edit(folder, "train", lambda result: result["history"].update(loss=[[22, 1.0], [44, float("nan")]]))
    figures = [json.loads(text) for kind, text in Page(render(folder)).scripts if kind == "application/json"]
    assert [1.0, None] in [trace["y"] for figure in figures for trace in figure["data"]]


@pytest.mark.parametrize("count", range(len(ALL) + 1))
def test_every_prefix_of_a_run_renders(folder: Path, count: int) -> None:
    keep(folder, ALL[:count])
    page = Page(render(folder))
    assert ("was not run; the command at the end runs it" in page.words) == (count < len(ALL))
    assert f"tnm-pipeline run --config {folder / 'config.toml'}" in page.words


def test_nothing_yet(folder: Path) -> None:
    keep(folder, ())
    page = Page(render(folder))
    assert "Nothing was trained, converted or exported yet." in page.words
    assert not page.scripts


def test_only_training(folder: Path) -> None:
    keep(folder, ("dense", "train"))
    text = verdict(read_run(folder))
    assert text.startswith("2:4-T kept 94.4% against 94.2% dense (+0.2 points); ")
    assert "3 layers hold the pattern in both directions in the checkpoint, not exported yet" in text
    assert text.endswith("latency was not measured yet.")


def test_a_given_checkpoint_has_no_twin(folder: Path) -> None:
    keep(folder, ("best", "export", "verify"))
    text = config_text(folder, "export.checkpoint=given.safetensors", "trt.enabled=false")
    folder.joinpath("config.toml").write_text(text, encoding="utf-8")
    edit(folder, "best", lambda result: result.update(route="given", candidates={}))
    edit(folder, "verify", lambda result: (result.update(latency={}, plan=None), result["scores"].pop("dense")))
    run = read_run(folder)
    assert verdict(run).startswith("The given 2:4-T checkpoint scores 94.4%, with no dense twin to compare it with")
    assert "no dense twin to time it against" in verdict(run)
    words = Page(render(folder)).words
    assert "does not ask for the stage build" in words
    assert "The checkpoint was given" in words


def test_a_given_checkpoint_without_zeros_is_called_dense(folder: Path) -> None:
    keep(folder, ("best", "export"))
    text = config_text(folder, "export.checkpoint=given.safetensors", "trt.enabled=false")
    folder.joinpath("config.toml").write_text(text, encoding="utf-8")
    edit(folder, "best", lambda result: result.update(route="given", candidates={}))

    def fill(result: dict[str, Any]) -> None:
        for file in result["files"]:
            for layer in file["sparsity"]["per_layer"]:
                layer.update(pattern=None, eligible=False)

    edit(folder, "export", fill)
    assert verdict(read_run(folder)).startswith("The given dense checkpoint scores 94.4%, with no dense twin")
    assert "sparse checkpoint, given" not in Page(render(folder)).words


def test_stages_that_the_configuration_does_not_ask_for_are_not_shown(folder: Path) -> None:
    folder.joinpath("config.toml").write_text(config_text(folder, 'run.routes=["train"]'), encoding="utf-8")
    labels = [score.label for score in read_run(folder).scores]
    assert not any("converted" in label for label in labels)


def test_what_a_training_started_from_is_no_route(folder: Path) -> None:
    text = config_text(folder, 'run.routes=["train"]', 'train.start="converted"')
    folder.joinpath("config.toml").write_text(text, encoding="utf-8")
    keep(folder, ("dense", "convert", "train"))
    edit(folder, "convert", lambda result: result.update(accuracy=1.0))
    assert read_run(folder).route == "train"


def test_verdict_without_a_gpu(folder: Path) -> None:
    text = verdict(read_run(folder))
    assert "2:4-T kept 94.4% against 94.2% dense (+0.2 points, 1 of 450 test samples)" in text
    assert "3 layers hold the pattern in both directions in the ONNX file" in text
    assert "ONNX Runtime CPU is unchanged (1.00x the dense time)" in text
    assert "because ONNX Runtime has no sparse kernels" in text
    assert text.endswith("no GPU here, so TensorRT latency was not measured.")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("faster", "on ONNX Runtime CPU said so, not because of sparsity"),
        ("spread-too-wide", "latency on ONNX Runtime CPU allows no claim: said so"),
    ],
)
def test_what_sparsity_cannot_cause_is_not_called_a_gain(folder: Path, key: str, words: str) -> None:
    claim = {"key": key, "sentence": "said so", "remedy": ""}
    edit(folder, "verify", lambda result: result["latency"]["onnxruntime"].update(claim=claim))
    assert words in verdict(read_run(folder))


def test_verdict_on_a_gpu(folder: Path) -> None:
    def time_on_gpu(result: dict[str, Any]) -> None:
        table = json.loads(json.dumps(result["latency"]["onnxruntime"]))
        table["environment"]["gpus"] = result["latency"]["onnxruntime"]["environment"]["gpus"] = ["NVIDIA H200"]
        claim = {"key": "faster", "sentence": "the sparse engine is faster", "remedy": ""}
        result["latency"]["tensorrt"] = table | {"backend": "tensorrt", "claim": claim}

    edit(folder, "verify", time_on_gpu)
    text = verdict(read_run(folder))
    assert "with TensorRT on NVIDIA H200, batch 8: the sparse engine is faster" in text
    assert "CPU" not in text
    render(folder)


def test_identical_plans_prove_only_that_the_flag_was_accepted(folder: Path) -> None:
    notes = " ".join(remarks(read_run(folder)))
    assert "byte-identical" in notes
    assert "proves that the flag was accepted and nothing more" in notes
    assert "3 of 5 layers eligible, flag set, 0 observed as picked" in notes
    edit(folder, "build", lambda result: result.update(identical=False))
    assert "byte-identical" not in " ".join(remarks(read_run(folder)))


def test_a_violation_is_the_first_thing_said(folder: Path) -> None:
    def break_layer(result: dict[str, Any]) -> None:
        for file in result["files"]:
            file["sparsity"]["per_layer"][1].update(violations_transposed=5)

    edit(folder, "export", break_layer)
    run = read_run(folder)
    assert "1 of 3 layers breaks the pattern in the ONNX file" in verdict(run)
    assert "Layer 3 should hold 2:4-T, but 0 groups of W and 5 groups of its transpose break it." in next(remarks(run))
    assert '<span class="bad">5</span>' in render(folder).read_text(encoding="utf-8")


def test_a_verification_that_failed_says_so(folder: Path) -> None:
    keep(folder, ALL[:-1])
    folder.joinpath(".cache").mkdir()
    folder.joinpath(".cache", "verify.started").touch()
    assert "Verification started and did not finish" in " ".join(remarks(read_run(folder)))
    edit(folder, "best", lambda result: result.update(accuracy=0.9))
    run = read_run(folder)
    assert verdict(run).startswith("2:4-T fell to 90.0% from 94.2% dense (-4.2 points; at most -2 was allowed)")
    assert "the stage verify started and did not finish" in Page(render(folder)).words


def test_a_gate_that_refuses_is_named_first(folder: Path) -> None:
    edit(folder, "verify", lambda result: result["scores"].update({"onnx fp32": 0.9}))
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
    edit(folder, "best", lambda result: result.update(route="convert"))
    layers = {layer.name: layer for layer in read_run(folder).layers}
    assert (layers["3"].type, layers["3"].shape, layers["3"].pattern) == ("Conv2d", (8, 8, 3, 3), "2:4-T")
    assert layers["3"].error_masked is not None
    assert layers["3"].error is not None
    assert layers["3"].error < layers["3"].error_masked
    assert layers["12"].error is None
    assert layers["12"].why_not == "registered last, kept dense (keep_last = true)"
    assert "masked → solved" in Page(render(folder)).words


def test_a_conversion_that_is_not_exported_does_not_claim_both_directions(folder: Path) -> None:
    keep(folder, ("dense", "convert"))
    run = read_run(folder)
    assert [layer.holds for layer in run.layers] == [None, None, None, None, None]
    assert "3 layers should hold the pattern, which nobody has counted in both directions yet" in verdict(run)


def test_picked_is_what_was_observed(folder: Path) -> None:
    unseen = [layer.picked for layer in read_run(folder).layers]
    assert unseen == ["", "not observed", "not observed", "not observed", ""]

    def observe(result: dict[str, Any]) -> None:
        for layer, picked in zip(result["verdict"]["layers"][1:3], (True, False), strict=True):
            layer["picked"] = picked

    edit(folder, "build", observe)
    assert [layer.picked for layer in read_run(folder).layers] == ["", "yes", "no", "not observed", ""]


def test_a_reason_has_a_key_and_a_remedy(folder: Path) -> None:
    layer = read_run(folder).layers[1]
    assert layer.key == "rtx-silent"
    assert layer.remedy
    assert "rtx-silent" in Page(render(folder)).words


def test_mask_pictures_outline_the_groups_that_break_the_pattern() -> None:
    # Each row keeps two of four; the first two columns keep three.
    rows = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    straight, transposed = mask_pictures(rows, Pattern(2, 4))
    assert (straight.violations, straight.broken) == (0, "")
    assert (transposed.violations, transposed.broken) == (2, "M0 0h4v1h-4zM0 1h4v1h-4z")
    assert straight.kept.count("M") == 8


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
