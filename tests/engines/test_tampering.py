"""No tampered artifact reaches a runtime: it is not even imported, in a process that shows a GPU to plans.

The default run tampers 300 times. 10,000 times, in some minutes:

    pytest -q -m slow tests/engines/test_tampering.py
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tnm_pipeline.engines import sign_artifact, verify_artifact, write_manifest
from tnm_pipeline.engines.artifact import read_manifest, sha256_of
from tnm_pipeline.engines.keys import write_key_pair
from tnm_pipeline.engines.manifest import ExternalFile

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.engines.tampering_process import main
main(Path(sys.argv[2]), int(sys.argv[3]), seed=0)
"""


def write_large(path: Path, model: Path, seed: int) -> None:
    """A network whose weights lie in a file beside it, with its manifest."""
    weight = np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", "weight"], ["output"], transB=1)],
        "large",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(weight, "weight")],
    )
    weights = path.with_name(path.name + ".data")
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(network, path, save_as_external_data=True, location=weights.name, size_threshold=0)
    facts = read_manifest(model)
    beside = (ExternalFile(weights.name, sha256_of(weights), weights.stat().st_size),)
    write_manifest(
        path,
        replace(facts, artifact=path.name, sha256=sha256_of(path), bytes=path.stat().st_size, external=beside),
    )


@pytest.fixture
def signed(tmp_path: Path, model: Path, other_model: Path, plan: Path, seal_plan: Callable[..., Path]) -> Path:
    """A folder with `good/` and `keys/` as `tampering_process` wants them."""
    folder = tmp_path / "tampering"
    for name in ("good/export", "good/build", "keys/stranger"):
        (folder / name).mkdir(parents=True)
    keys = write_key_pair(folder / "keys")
    write_key_pair(folder / "keys/stranger")
    export, build = folder / "good/export", folder / "good/build"
    provenance = {"packages": {"torch": "2.13.0"}}
    for name, source in ((model.name, model), ("other.onnx", other_model)):
        shutil.copyfile(source, export / name)
        write_manifest(export / name, replace(read_manifest(source), artifact=name, provenance=provenance))
    write_large(export / "large.onnx", export / model.name, seed=2)
    write_large(export / "other.data.onnx", export / model.name, seed=3)
    (export / "other.data.onnx.data").rename(export / "other.data")
    (export / "other.data.onnx").unlink()
    (export / "other.data.onnx.manifest.json").unlink()
    shutil.copyfile(plan, build / plan.name)
    built = read_manifest(plan)
    seal_plan(build / plan.name, export / model.name, backend=built.backend, backend_version=built.backend_version)
    write_manifest(build / plan.name, replace(read_manifest(build / plan.name), provenance=provenance))
    for artifact in (*export.glob("*.onnx"), *build.glob("*.plan")):
        sign_artifact(artifact, keys[0])
        verify_artifact(artifact, [keys[1]])
    return folder


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_tampered_artifacts_are_refused_and_reach_no_runtime(
    count: int, signed: Path, run_on_host_driver: Callable[..., str]
) -> None:
    """With a key all of them; without one, all but those whose manifest somebody made to agree with the artifact."""
    report: dict[str, Any] = json.loads(run_on_host_driver(CODE, ROOT, signed, count))
    assert report["findings"] == []
    assert report["tampered"] == sum(report["kinds"].values()) == count
    assert report["imported"] == report["modules"] == []
    assert report["imported untampered"] == ["onnxruntime", "tensorrt_rtx"]  # the guard was awake
    assert sum(number for name, number in report["classes"].items() if name.startswith("with a key")) == count
    assert {name.partition(": ")[2] for name in report["classes"]} == {
        "ArtifactRejected",
        "SignatureRejected",
        "EnvironmentLacks",  # plans for another GPU, operating system or CPU
        "accepted",
    }
    assert len(report["kinds"]) > 25
