import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tnm_pipeline.engines import EnvironmentLacks, Manifest, verify_artifact, write_manifest
from tnm_pipeline.engines.artifact import read_manifest
from tnm_pipeline.engines.machine import check_machine, this_machine


@pytest.fixture
def manifest(model: Path, tmp_path: Path, seal_plan: Callable[..., Path]) -> Manifest:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"a plan")
    seal_plan(
        path,
        model,
        backend="tensorrt",
        backend_version="10.13.0.35",
        operating_system="linux",
        cpu_architecture="x86_64",
    )
    return read_manifest(path)


@pytest.mark.parametrize(
    ("system", "cpu", "expected"),
    [
        ("Linux", "x86_64", ("linux", "x86_64")),
        ("Windows", "AMD64", ("windows", "x86_64")),
        ("Linux", "aarch64", ("linux", "aarch64")),
        ("Darwin", "arm64", ("darwin", "aarch64")),
    ],
)
def test_one_name_for_one_machine(
    system: str, cpu: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: cpu)
    assert this_machine() == expected


@pytest.mark.parametrize(("system", "cpu"), [("Windows", "AMD64"), ("Linux", "aarch64")])
def test_another_machine_is_named_with_both_sides(
    system: str, cpu: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: cpu)
    here = " on ".join(this_machine())
    with pytest.raises(
        EnvironmentLacks, match=f"built for linux on x86_64, and this machine is {here}.*`tnm-pipeline export --trt`"
    ):
        check_machine(manifest)


def test_a_plan_of_another_machine_imports_no_runtime_and_its_source_may_answer(
    plan: Path, run_on_host_driver: Callable[..., str]
) -> None:
    elsewhere = dataclasses.replace(read_manifest(plan), operating_system="plan9", cpu_architecture="mips")
    write_manifest(plan, elsewhere)
    code = """
import sys
from tnm_pipeline.engines import EnvironmentLacks, load
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(sorted({"tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime"} & set(sys.modules)), error)
with load(sys.argv[1], fallback="onnxruntime", device="cpu") as session:
    print(session.fallback_reason)
"""
    refused, reason = run_on_host_driver(code, plan).splitlines()
    assert refused.startswith("[] model.fp16.plan was built for plan9 on mips, and this machine is ")
    assert "fallback='onnxruntime'" in refused
    assert reason.startswith("model.fp16.plan was built for plan9 on mips")


def test_the_same_machine_and_an_artifact_of_no_machine_are_accepted(
    manifest: Manifest, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    check_machine(manifest)
    monkeypatch.setattr(platform, "system", lambda: "Plan9")
    check_machine(dataclasses.replace(manifest, operating_system=None, cpu_architecture=None))
    check_machine(verify_artifact(model))
