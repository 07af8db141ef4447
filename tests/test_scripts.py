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
