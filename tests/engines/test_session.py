import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tnm_pipeline.engines import ArtifactRejected, EnvironmentLacks, FeedError, SessionClosed, TensorSpec, load
from tnm_pipeline.engines.artifact import manifest_path
from tnm_pipeline.engines.driver import probe

without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="this is what a machine without a GPU answers")

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "torch", "onnx")


def batch(rows: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal((rows, 8)).astype(np.float32)


def direct(model: Path, array: np.ndarray[Any, Any]) -> Any:
    """What ONNX Runtime itself answers."""
    session = onnxruntime.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": array})[0]


def in_fresh_process(code: str, *arguments: str) -> str:
    """Run `code` where nothing is imported yet; its stdout, after a clean exit."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_three_lines_answer_as_onnx_runtime_does(model: Path) -> None:
    with load(model, device="cpu") as session:
        answers = session.run({"input": batch()})
    assert list(answers) == ["output"]
    np.testing.assert_array_equal(answers["output"], direct(model, batch()))
    assert (session.backend, session.device, session.fallback_reason) == ("onnxruntime", "cpu", None)


def test_a_session_states_what_it_takes(model: Path) -> None:
    with load(str(model), device="cpu") as session:
        assert session.inputs == (TensorSpec("input", "float32", ("batch", 8), {}),)
        assert session.outputs == (TensorSpec("output", "float32", ("batch", 16), {}),)
        assert session.manifest.artifact == model.name


def test_a_wrong_feed_is_refused_and_the_session_goes_on(model: Path) -> None:
    with load(model, device="cpu") as session:
        with pytest.raises(FeedError, match=r"pass input\.astype\('float32'\)"):
            session.run({"input": batch().astype(np.float64)})
        assert session.run({"input": batch(1)})["output"].shape == (1, 16)


def test_a_closed_session_says_so_and_closes_twice(model: Path) -> None:
    session = load(model, device="cpu")
    session.close()
    session.close()
    with pytest.raises(SessionClosed, match=r"model\.fp32\.onnx is closed"):
        session.run({"input": batch()})


@pytest.mark.parametrize(("option", "allowed"), [("fallback", "error, onnxruntime"), ("device", "auto, cpu, cuda")])
def test_an_unknown_option_names_the_known_ones(model: Path, option: str, allowed: str) -> None:
    options: dict[str, Any] = {option: "gpu"}
    with pytest.raises(ValueError, match=f"{option} is 'gpu'; choose one of {allowed}"):
        load(model, **options)


@pytest.mark.parametrize("fallback", ["error", "onnxruntime"])
@pytest.mark.parametrize("artifact", ["model", "plan"])
def test_a_damaged_file_reaches_no_runtime(artifact: str, fallback: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(artifact)
    flip_a_bit(path)
    code = f"""
import sys
from tnm_pipeline.engines import ArtifactRejected, load
try:
    load(sys.argv[1], fallback=sys.argv[2])
except ArtifactRejected as error:
    print(sorted(set({RUNTIMES}) & set(sys.modules)), error)
"""
    said = in_fresh_process(code, str(path), fallback)
    assert said.startswith(f"[] {path} has sha256 ")


@pytest.mark.parametrize("artifact", ["model", "plan"])
def test_an_artifact_without_its_manifest_is_refused(artifact: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(artifact)
    manifest_path(path).unlink()
    with pytest.raises(ArtifactRejected, match=r"manifest\.json is missing.*`tnm-pipeline export"):
        load(path, fallback="onnxruntime")


def test_an_edited_manifest_is_refused(model: Path) -> None:
    path = manifest_path(model)
    path.write_text(path.read_text().replace('"fp32"', '"fp16"'))
    with pytest.raises(ArtifactRejected, match="edited since it was written"):
        load(model)


def test_loading_and_running_an_onnx_file_never_imports_torch(model: Path) -> None:
    code = """
import sys
import numpy
from tnm_pipeline.engines import load
with load(sys.argv[1], device="cpu") as session:
    session.run({"input": numpy.zeros((2, 8), "float32")})
print(sorted({"torch", "onnx", "tensorrt", "tensorrt_rtx"} & set(sys.modules)))
"""
    assert in_fresh_process(code, str(model)).strip() == "[]"


def test_numpy_and_a_runtime_are_enough(model: Path) -> None:
    """All that is loaded besides Python's own: what a bare machine must have."""
    code = """
import sys
import numpy
from tnm_pipeline.engines import Batching, load
feeds = {"input": numpy.zeros((2, 8), "float32")}
with load(sys.argv[1], device="cpu", batching=Batching()) as session:
    session.run(feeds)
    session.metrics()
for name, module in sorted(sys.modules.items()):
    if "site-packages" in str(getattr(module, "__file__", "")) and not name.startswith("_"):
        print(name.partition(".")[0])
"""
    assert set(in_fresh_process(code, str(model)).split()) <= {"numpy", "onnxruntime", "sitecustomize"}


def test_without_onnx_runtime_the_command_is_named(model: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from tnm_pipeline.engines import EnvironmentLacks, load
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(error)
"""
    said = in_fresh_process(code, str(model))
    assert said.startswith("model.fp32.onnx needs ONNX Runtime: ")
    assert "pip install onnxruntime" in said


@without_gpu
def test_a_plan_without_a_gpu_says_what_to_do_and_imports_no_tensorrt(plan: Path, model: Path) -> None:
    code = """
import sys
from tnm_pipeline.engines import EnvironmentLacks, load
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(sorted({"tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime"} & set(sys.modules)), error)
"""
    said = in_fresh_process(code, str(plan))
    assert said.startswith("[] model.fp16.plan is a tensorrt_rtx plan and needs a GPU: ")
    source = str(plan.parent.parent / "export" / model.name)
    for way_out in ("a machine with an NVIDIA driver", "fallback='onnxruntime'", f"load({source!r})"):
        assert way_out in said


@without_gpu
def test_the_fallback_answers_as_the_source_does_and_says_why(plan: Path, model: Path) -> None:
    with load(plan, fallback="onnxruntime") as session:
        answer = session.run({"input": batch()})["output"]
        assert session.backend == "onnxruntime"
        assert session.manifest.artifact == model.name
        assert session.fallback_reason is not None
        assert "needs a GPU" in session.fallback_reason
    np.testing.assert_array_equal(answer, direct(model, batch()))


@without_gpu
def test_a_fallback_is_logged_and_nothing_is_printed_unasked(plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(plan, fallback="onnxruntime").close()
    assert [record.levelname for record in caplog.records if record.name == "tnm_pipeline.engines"] == ["WARNING"]
    code = "import sys; from tnm_pipeline.engines import load; load(sys.argv[1], fallback='onnxruntime').close()"
    done = subprocess.run([sys.executable, "-c", code, plan], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@without_gpu
@pytest.mark.parametrize("damage", ["flip", "manifest", "gone"])
def test_a_damaged_source_is_no_fallback(plan: Path, model: Path, damage: str) -> None:
    if damage == "flip":
        flip_a_bit(model)
    else:
        (manifest_path(model) if damage == "manifest" else model).unlink()
    with pytest.raises(ArtifactRejected, match=r"model\.fp32\.onnx"):
        load(plan, fallback="onnxruntime")


@without_gpu
def test_another_valid_model_under_the_source_name_is_no_fallback(plan: Path, model: Path, other_model: Path) -> None:
    other_model.replace(model)
    manifest_path(other_model).replace(manifest_path(model))
    load(model, device="cpu").close()  # valid by itself
    with pytest.raises(ArtifactRejected, match=r"model\.fp16\.plan was built from [0-9a-f]{64}"):
        load(plan, fallback="onnxruntime")


@without_gpu
def test_a_source_that_is_itself_a_plan_is_no_fallback(plan: Path, seal_plan: Callable[..., Path]) -> None:
    copy = plan.with_name("copy.plan")
    copy.write_bytes(plan.read_bytes())
    seal_plan(copy, plan, backend="tensorrt_rtx", backend_version="1.7")
    with pytest.raises(ArtifactRejected, match="is a tensorrt_rtx plan, not the ONNX file"):
        load(copy, fallback="onnxruntime")


@without_gpu
def test_a_plan_that_names_no_source_has_no_fallback(plan: Path, model: Path, seal_plan: Callable[..., Path]) -> None:
    seal_plan(plan, model, backend="tensorrt_rtx", backend_version="1.7", source_onnx=None, source_sha256=None)
    with pytest.raises(EnvironmentLacks, match="names no source ONNX"):
        load(plan, fallback="onnxruntime")
    with pytest.raises(EnvironmentLacks, match=r"compute capability 8\.0, 8\.9$"):
        load(plan)
