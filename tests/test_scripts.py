"""The scripts run from end to end on small data of their formats."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.training.zoo import SENTENCES

ROOT = Path(__file__).parents[1]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], capture_output=True, text=True)


@pytest.fixture
def benchmark_data(tmp_path: Path) -> Path:
    """Pairs of sentences of three years, and pictures of soft colours."""
    lines = ["task\tscore\tsentence1\tsentence2"]
    for index, sentence in enumerate(SENTENCES):
        year, other = (2012, 2013, 2014, 2014)[index % 4], SENTENCES[index * 7 % len(SENTENCES)]
        lines.append(f"{year}.made-up\t{index % 6}\t{sentence}\t{other}")
    (tmp_path / "sts-2012-2014.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    blobs = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(blobs, size=256, mode="bilinear").mul(255).byte().permute(0, 2, 3, 1)
    with tarfile.open(tmp_path / "imagenet-sample.tar", "w") as archive:
        for index, picture in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(picture.numpy()).save(file, "jpeg")
            member = tarfile.TarInfo(f"./{index}_n0000.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
    return tmp_path


@pytest.mark.slow
def test_bench_convert_measures_every_case(benchmark_data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_script("bench_convert.py", "--quick", "--data", str(benchmark_data), "--json", str(report))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["environment"]["sentences"] == 32
    rows = written["rows"]
    assert {row["model"] for row in rows} == {"minilm", "efficientnet"}
    converted = [row for row in rows if row["method"] != "none"]
    assert converted
    for row in converted:
        assert row["cpu_s"] > 0
        assert row["peak_mb"] > 0
        assert row["violations"] == 0
        assert row.get("violations_transposed", 0) == 0
        if row["model"] == "minilm":
            assert 0 < row["err"] < 1
            assert 0.5 < row["cos"] < 1
    baseline = next(row for row in rows if row["method"] == "adaprune")
    assert baseline["err_ratio"] == baseline["times_faster"] == 1
    assert "times faster" in done.stdout


@pytest.mark.slow
def test_bench_convert_says_which_data_are_missing(tmp_path: Path) -> None:
    done = run_script("bench_convert.py", "--data", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path / 'sts-2012-2014.tsv'} is not there" in done.stderr


@pytest.fixture
def coloured_archive(tmp_path: Path) -> Path:
    """CIFAR-10's archive in small: ten classes, 20 soft pictures of each to train on and 4 to test."""
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(tmp_path / "cifar10.tar.xz", "w:xz") as archive:
        for split, number in (("train", 20), ("test", 4)):
            for index in range(10 * number):
                blobs = torch.rand(1, 3, 4, 4, generator=generator)
                pixels = F.interpolate(blobs, size=32, mode="bilinear").mul(255).byte()[0].permute(1, 2, 0)
                file = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(file, "jpeg")
                member = tarfile.TarInfo(f"{split}/class{index % 10}/{index // 10:04}.jpg")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)
    return tmp_path


@pytest.mark.slow
def test_bench_accuracy_measures_every_case_and_goes_on_where_it_was_stopped(
    coloured_archive: Path, tmp_path: Path
) -> None:
    report, progress = tmp_path / "report.json", tmp_path / "progress.jsonl"
    options = ["--task", "cifar10", "--quick", "--search", "--data", str(coloured_archive), "--cache", str(tmp_path)]
    options += ["--progress", str(progress), "--json", str(report)]
    done = run_script("bench_accuracy.py", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["environment"]["images"] == {"train": 128, "validation": 64, "test": 40}
    cases = {row["case"]: row for row in written["rows"]}
    assert len(cases) == 10
    assert len(cases["dense"]["accuracy"]) == 2
    for row in cases.values():
        if row["case"].startswith(("static", "gradual", "dynamic", "paper")):
            assert row["violations"] == 0
            assert (row["violations_transposed"] == 0) is row["pattern"].endswith("-T")
    dense, default = cases["dense"]["accuracy"], cases["dynamic 2:4-T"]["accuracy"]
    first = written["comparisons"][0]
    assert (first["case"], first["baseline"]) == ("dynamic 2:4-T", "dense")
    assert first["gap"] == pytest.approx(sum(default) / 2 - sum(dense) / 2, abs=1e-3)
    assert first["interval95"] == pytest.approx(  # two differences: t = 12.706, deviation / sqrt(2) = half the range
        12.706 / 2 * abs((default[1] - dense[1]) - (default[0] - dense[0])), rel=1e-3, abs=1e-3
    )
    assert not any("test" in row for row in written["search"])

    lines = progress.read_text(encoding="utf-8").splitlines()
    progress.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    again = run_script("bench_accuracy.py", *options)
    assert again.returncode == 0, again.stderr
    without_time = [{key: value for key, value in row.items() if key != "seconds"} for row in written["rows"]]
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in rows] == without_time
    assert len(progress.read_text(encoding="utf-8").splitlines()) == len(lines)


@pytest.mark.slow
def test_bench_accuracy_says_which_data_are_missing(tmp_path: Path) -> None:
    done = run_script("bench_accuracy.py", "--task", "cifar10", "--data", str(tmp_path), "--cache", str(tmp_path))
    assert done.returncode != 0
    assert f"{tmp_path / 'cifar10.tar.xz'} is not there" in done.stderr


@pytest.mark.slow
def test_bench_training_step_measures_every_twin(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_script("bench_training_step.py", "--quick", "--json", str(report))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))
    assert [row["twin"] for row in written["rows"] if row["network"] == "mlp"] == [
        "dense",
        "dense again",
        "masked weight",
        "masked weight, pull",
        "K = 40",
        "K = 1",
    ]
    for row in written["rows"]:
        assert row["milliseconds"] > 0
        if row["twin"].startswith("K"):
            assert 0 < row["refresh_share"] < 1
    assert {(row["pattern"], row["solver"]) for row in written["solvers"]} == {
        (pattern, solver) for pattern in ("2:4-T", "4:8-T") for solver in ("exact", "greedy", "flow")
    }
    assert written["memory"]["buffer_bytes"] == 1


@pytest.mark.slow
def test_bench_finetune_trains_every_arm_once(benchmark_data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--quick", "--data", str(benchmark_data), "--cache", str(tmp_path / "cache"), "--json", str(report)]
    arms = ("--arms", "converted, static", "converted dense, taught", "converted")
    done = run_script("bench_finetune.py", *options, *arms)
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row for row in json.loads(report.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["dense", "converted, static", "converted dense, taught", "converted"]
    assert [row["epochs"] for row in rows.values()] == [1, 1, 2, 1]
    for row in list(rows.values())[1:]:
        assert row["layers"] == 36
        assert row["violations"] == row["violations_transposed"] == 0
        assert row["gap"] == pytest.approx(row["mean"] - rows["dense"]["mean"], abs=2e-4)
    again = run_script("bench_finetune.py", *options, *arms)
    assert again.returncode == 0, again.stderr
    assert '"arm"' not in again.stderr  # all of it was done


@pytest.mark.slow
def test_gpu_export_has_a_quick_mode_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in ("pydantic", "typer", "rich"):  # machines with GPUs are lent with torch alone
        (tmp_path / f"{absent}.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = tmp_path / "report.json"
    done = run_script("gpu_export.py", "--quick", "--json", str(report))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["environment"]["cores"] >= 1
    assert {row["network"] for row in written["rows"]} == {"products 64", "residual", "encoder"}
    for row in written["rows"]:
        assert row["sparse_us"] > 0
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert row["claim"] in ("faster", "no-difference", "dense-faster", "spread-too-wide")
        assert row["error"] < 1e-5
        assert row["picked"] is None
    assert {one["way"] for one in written["skipped"]} == {"tensorrt", "tensorrt_rtx", "torch"}
    assert "skipped: tensorrt_rtx: --quick is for the CPU" in done.stdout


@pytest.mark.slow
def test_gpu_export_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_script("gpu_export.py")
    assert done.returncode == 4
    assert "--quick on the CPU" in done.stderr


@pytest.mark.slow
def test_gpu_engines_has_a_quick_mode_for_the_cpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_script("gpu_engines.py", "--quick", "--json", str(report))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))
    rows = written["rows"]
    assert written["environment"]["cores"] >= 1
    assert {row["question"] for row in rows} == {"answers", "contexts", "load"}
    assert {row["network"] for row in rows} == {"products 64", "residual", "encoder"}
    for row in rows:
        if row["question"] == "answers":
            assert row["error"] == 0  # the reference is the same runtime
        elif row["question"] == "contexts":
            assert row["samples_per_s"] > 0
            assert row["range"][0] <= row["ratio"] <= row["range"][1]
        else:
            assert row["load_s"] > 0
            assert row["first_answer_s"] > 0
    assert {one["way"] for one in written["skipped"]} == {"tensorrt", "tensorrt_rtx", "onnxruntime"}
    assert "skipped: onnxruntime, arrays: --quick is for the CPU" in done.stdout


@pytest.mark.slow
def test_gpu_engines_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_script("gpu_engines.py")
    assert done.returncode == 4
    assert "--quick on the CPU" in done.stderr


@pytest.mark.slow
def test_bench_engines_measures_every_table_but_batching(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_script("bench_engines.py", "--quick", "--json", str(report))
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert [row["table"] for row in rows] == ["import", "overhead", "overhead", *["threads"] * 4]
    assert all(row["raw_us"] > 0 and row["rounds"] > 100 for row in rows if row["table"] == "overhead")
