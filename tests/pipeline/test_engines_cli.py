"""`tnm-pipeline engines`: what a person and a script are told, and with which exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipeline.conftest import Ended
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, verify_artifact, write_manifest
from tnm_pipeline.engines.signature import signature_path

Tnm = Callable[..., Ended]
SOURCE, PLAN = "export/model.fp16.onnx", "build/model.fp16.plan"


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of what a small run exported and built."""
    for name in ("export", "build"):
        shutil.copytree(small_run / "run" / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def keys(tnm: Tnm, tmp_path: Path) -> Path:
    ended = tnm("engines", "keygen", "keys")
    assert ended.code == 0, ended.err
    assert "signing-key.pem: keep it secret" in ended.out
    return tmp_path / "keys"


def test_check_tells_all_that_is_known(run: Path, tnm: Tnm) -> None:
    ended = tnm("engines", "check", str(run / PLAN))
    assert ended.code == 0, ended.err
    for said in (
        "in order",
        "tensorrt_rtx plan, fp16",
        f"{read_manifest(run / PLAN).sha256}, as in the manifest",
        "none",
        "batch 1 to 64, best 8",
        "any operating system and CPU",
        "../export/model.fp16.onnx, the one it was built from",
        "layers eligible, flag set",
        "checkpoint_sha256",
    ):
        assert said in ended.out, said


def test_check_loads_no_runtime(run: Path) -> None:
    code = """
import sys
from tnm_pipeline.pipeline.cli import main
sys.argv[:1] = ["tnm-pipeline", "engines", "check"]
try:
    main()
except SystemExit as ended:
    print(ended.code, sorted({"onnxruntime", "tensorrt", "tensorrt_rtx", "onnx", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_folder_means_all_that_is_in_it(run: Path, tnm: Tnm) -> None:
    checked = tnm("engines", "check", str(run), "--json").json()
    assert isinstance(checked, list)
    names = {Path(item["path"]).relative_to(run).as_posix() for item in checked}
    assert {SOURCE, PLAN, "build/engine.plan", "build/model.fp16.dense.plan", "export/dense.fp32.onnx"} <= names
    assert all(item["refused"] is None and item["manifest"]["schema"] == 1 for item in checked)
    (run / PLAN).write_bytes(b"another")
    manifest_path(run / SOURCE).unlink()
    ended = tnm("engines", "check", str(run))
    assert ended.code == 3
    assert f"{run / PLAN}: REFUSED" in ended.out
    assert f"{run / SOURCE}: REFUSED" in ended.out
    assert f"{run / 'export/dense.fp32.onnx'}: in order" in ended.out
    assert f"of {len(checked)} artifacts were refused" in ended.err
    assert tnm("engines", "check", str(run / "nothing")).code == 3
    (run / "empty").mkdir()
    ended = tnm("engines", "check", str(run / "empty"))
    assert (ended.code, "holds no artifact" in ended.err) == (3, True)


def test_sign_and_demand_the_signature(run: Path, keys: Path, tnm: Tnm) -> None:
    secret, public = str(keys / "signing-key.pem"), str(keys / "signing-key.pub.pem")
    ended = tnm("engines", "sign", str(run / PLAN), "--key", secret)
    assert ended.code == 0, ended.err
    assert f"{signature_path(run / PLAN)}: by sha256:" in ended.out
    assert "model.fp16.onnx is not signed: sign it too" in ended.err
    ended = tnm("engines", "check", str(run / PLAN), "--trusted", public)
    assert (ended.code, "model.fp16.onnx is not signed" in ended.err) == (3, True)
    signed = tnm("engines", "sign", str(run), "--key", secret, "--json")
    assert signed.err == ""
    ended = tnm("engines", "check", str(run), "--trusted", public)
    assert ended.code == 0, ended.err
    assert f"by {signed.json()['key']}, which is trusted" in ended.out
    assert "present, not checked" in tnm("engines", "check", str(run / PLAN)).out
    verify_artifact(run / PLAN, [public])
    write_manifest(run / PLAN, replace(read_manifest(run / PLAN), gpu="NVIDIA H200"))
    assert tnm("engines", "check", str(run / PLAN)).code == 0
    ended = tnm("engines", "check", str(run / PLAN), "--trusted", public)
    assert (ended.code, "was changed after it was signed" in ended.err) == (3, True)


def test_only_what_is_in_order_is_signed(run: Path, keys: Path, tnm: Tnm) -> None:
    (run / SOURCE).write_bytes(b"another")
    assert tnm("engines", "sign", str(run / SOURCE), "--key", str(keys / "signing-key.pem")).code == 3
    assert not signature_path(run / SOURCE).exists()


def test_keys_and_passwords(run: Path, tmp_path: Path, keys: Path, tnm: Tnm) -> None:
    ended = tnm("engines", "keygen", str(keys))
    assert (ended.code, "no key is overwritten" in ended.err) == (2, True)
    (tmp_path / "password").write_text("open sesame\nignored\n")
    locked = tmp_path / "locked"
    assert tnm("engines", "keygen", str(locked), "--password-file", "password", "--json").code == 0
    sign = ("engines", "sign", str(run / SOURCE), "--key", str(locked / "signing-key.pem"))
    ended = tnm(*sign)
    assert (ended.code, "cannot be used as a private key" in ended.err) == (3, True)
    assert tnm(*sign, "--password-file", "absent").code == 2
    (tmp_path / "empty").touch()
    assert tnm(*sign, "--password-file", "empty").code == 2
    ended = tnm(*sign, "--password-file", "password")
    assert ended.code == 0, ended.err
    assert tnm("engines", "check", str(run / SOURCE), "--trusted", str(locked / "signing-key.pub.pem")).code == 0
    ended = tnm("engines", "check", str(run / SOURCE), "--trusted", "absent.pem")
    assert ended.code == 3
    assert "the key absent.pem cannot be read: No such file or directory. Make a key pair" in ended.err
    assert ended.err.count("Make a key pair") == 1


def test_verify_runs_it_too(run: Path, keys: Path, tnm: Tnm) -> None:
    ended = tnm("engines", "verify", str(run / SOURCE))
    assert ended.code == 0, ended.err
    assert "loaded and run by onnxruntime; the outputs are finite" in ended.out
    ended = tnm("engines", "verify", str(run / SOURCE), "--trusted", str(keys / "signing-key.pub.pem"))
    assert (ended.code, "is not signed" in ended.err) == (3, True)
    assert "loaded" not in ended.out
    [item] = tnm("engines", "verify", str(run / PLAN), "--fallback", "onnxruntime", "--json").json()
    assert item["refused"] is None
    assert "loaded and run by" in json.dumps(item["ran"])


def test_a_plan_of_another_machine_is_told_apart_and_not_refused(run: Path, tnm: Tnm) -> None:
    manifest = read_manifest(run / PLAN)
    write_manifest(run / PLAN, replace(manifest, operating_system="plan9", cpu_architecture="mips"))
    ended = tnm("engines", "check", str(run / PLAN))
    assert ended.code == 0
    assert "no: model.fp16.plan was built for plan9 on mips, and this machine is " in ended.out


def test_control_characters_do_not_reach_the_terminal(run: Path, tnm: Tnm) -> None:
    write_manifest(run / SOURCE, replace(read_manifest(run / SOURCE), provenance={"by": "\x1b[2Jnobody"}))
    ended = tnm("engines", "check", str(run / SOURCE))
    assert ended.code == 0
    assert "\x1b" not in ended.out
    assert r"\x1b[2Jnobody" in ended.out
