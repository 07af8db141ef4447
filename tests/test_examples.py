"""The examples: their configurations are valid, a small version of each really trains, and the service serves."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from tests.pipeline.conftest import Ended, tnm  # noqa: F401  # a fixture
from tests.training.labelled import write_encoder, write_images, write_pairs
from tnm_pipeline.engines import write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.pipeline.config import load_config
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import select
from tnm_pipeline.training.sources import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
Tnm = Callable[..., Ended]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.sparsity.pattern == "2:4-T"
    assert config.run.routes == ("train",)
    assert config.run.folder == Path("runs") / path.stem.replace("_", "-")


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_layer_but_the_ends_can_be_sparse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES.parent)
    model = load_model(f"examples.models:{name}", {})
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    choice = select(model, Pattern.parse("2:4-T"))
    assert len(choice.chosen) == {"resnet": 20, "vit": 24}[name]
    assert len(choice.skipped) == {"resnet": 2, "vit": 2}[name]


SMALL_VIT = "{ size = 8, patch = 4, width = 16, depth = 1, heads = 2, classes = 2 }"
SMALL_RESNET = "{ width = 4, depth = 1, classes = 2 }"


@pytest.mark.parametrize(("network", "arguments"), [("resnet", SMALL_RESNET), ("vit", SMALL_VIT)])
def test_a_small_image_classifier_trains(
    tnm: Tnm,  # noqa: F811  # the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    arguments: str,
) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES.parent), *sys.path])
    write_images(tmp_path / "pictures")
    ended = tnm(
        *("train", "--config", str(EXAMPLES / "image_classifier.toml"), "--data", "pictures", "--json"),
        *("--model", f"examples.models:{network}", "--set", f"model.args={arguments}"),
        *("--set", "data.args.size=8", "--set", "data.args.resize=8", "--set", "data.args.pad=1"),
        *("--set", "train.epochs=1", "--set", "train.batch_size=8"),
    )
    assert ended.code == 0, ended.err
    layers = ended.json()["stages"]["train"]["result"]["layers"]
    assert [row["violations"] + row["violations_transposed"] for row in layers if row["pattern"]]
    assert not any(row["violations"] + row["violations_transposed"] for row in layers if row["pattern"])


def test_a_small_sentence_encoder_trains(tnm: Tnm, tmp_path: Path) -> None:  # noqa: F811  # the fixture
    write_encoder(tmp_path / "bert")
    write_pairs(tmp_path / "pairs.tsv")
    ended = tnm("train", "--config", str(EXAMPLES / "sentence_encoder.toml"), "--model", "hf:bert", "--json")
    assert ended.code == 0, ended.err
    result = ended.json()["stages"]["train"]["result"]
    assert -1 <= result["spearman"] <= 1
    assert len([row for row in result["layers"] if row["pattern"]]) == 12
    assert json.loads((tmp_path / "runs/sentence-encoder/train/result.json").read_text())["metric"] == "spearman"


def test_the_service_answers_over_http(tmp_path: Path) -> None:
    """examples/serve.py as a process of its own: answers, statuses, metrics, a reload, and an end by SIGINT."""
    weight = np.eye(4, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    write_manifest(path, onnx_manifest(path, precision="fp32", sparsity={}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(path), str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        while "running on" not in (line := service.stderr.readline()):
            assert line, "it ended"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            answer = client.post("/run", json={"inputs": {"x": [[1, 2, 3, 4]]}})
            assert (answer.status_code, answer.json()) == (200, {"outputs": {"y": [[1, 2, 3, 4]]}})
            for inputs, says in (({"z": [1]}, "missing inputs"), ({"x": [[1, 2]]}, "axis 1"), ({"x": [[1], 2]}, "")):
                refused = client.post("/run", json={"inputs": inputs})
                assert refused.status_code == 422
                assert says in refused.json()["error"]
            for body in (
                {"inputs": {"x": {"a": 1}}},
                {"inputs": {"x": [[1e39, 0, 0, 0]]}},
                {"inputs": {}, "timeout": 0},
            ):
                assert client.post("/run", json=body).status_code == 422
            assert client.post("/run", content='{"inputs": {}, "timeout": NaN}').status_code == 422
            assert client.post("/reload").json()["sha256"] == client.get("/health").json()["sha256"]
            path.write_bytes(b"damaged")
            assert client.post("/reload").status_code == 409
            assert client.post("/run", json={"inputs": {"x": [[1, 2, 3, 4]]}}).status_code == 200
            metrics = client.get("/metrics").text
            assert 'tnm_session_answered_total{session="main"} 2.0' in metrics
            assert 'tnm_session_reloads_total{session="main"} 1.0' in metrics
        service.send_signal(signal.SIGINT)
        assert "Finished server process" in service.stderr.read()
    assert service.returncode == 0
