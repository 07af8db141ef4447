"""Signatures, with keys made for each test: none is in the repository."""

import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tnm_pipeline.engines import (
    EnvironmentLacks,
    KeyRejected,
    SignatureRejected,
    load,
    sign_artifact,
    verify_artifact,
)
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, read_verified, sha256_of
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.engines.keys import fingerprint, is_encrypted, private_key, public_keys, write_key_pair
from tnm_pipeline.engines.signature import check_signature, signature_path

CHECKS: list[Callable[..., object]] = [read_manifest, verify_artifact, read_verified]
check_forms = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Private and public key."""
    folder = tmp_path / "keys"
    folder.mkdir()
    return write_key_pair(folder)


@pytest.fixture
def stranger(tmp_path: Path) -> tuple[Path, Path]:
    """Somebody else's."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    return write_key_pair(folder)


def other_kind(folder: Path) -> tuple[Path, Path]:
    """A pair of keys for another algorithm."""
    key = generate_private_key(SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "ec.pem").write_bytes(secret)
    (folder / "ec.pub.pem").write_bytes(public)
    return folder / "ec.pem", folder / "ec.pub.pem"


@check_forms
def test_a_signed_artifact_is_accepted_by_its_key_alone_or_among_others(
    check: Callable[..., object], model: Path, pair: tuple[Path, Path], stranger: tuple[Path, Path]
) -> None:
    assert sign_artifact(model, pair[0]) == signature_path(model)
    raw = public_keys([pair[1]])[0].public_bytes_raw()
    for keys in ([pair[1]], [str(pair[1])], [raw], [stranger[1], pair[1]], None):
        assert check(model, keys) == check(model)
    with pytest.raises(KeyRejected, match="no key is trusted"):  # a glob that matched nothing must not open the door
        check(model, [])
    with pytest.raises(SignatureRejected, match="is of another key than sha256:"):
        check(model, [stranger[1]])


@check_forms
def test_an_unsigned_artifact_is_refused_where_a_key_is_given(
    check: Callable[..., object], model: Path, pair: tuple[Path, Path]
) -> None:
    with pytest.raises(SignatureRejected, match=r"model\.fp32\.onnx is not signed.*`tnm-pipeline engines sign .*--key"):
        check(model, [pair[1]])


def test_what_is_signed_is_the_manifest_byte_for_byte(model: Path, pair: tuple[Path, Path]) -> None:
    sign_artifact(model, pair[0])
    [key] = public_keys([pair[1]])
    key.verify(signature_path(model).read_bytes(), manifest_path(model).read_bytes())


def test_openssl_accepts_the_same_signature(model: Path, pair: tuple[Path, Path]) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    sign_artifact(model, pair[0])
    command: list[str | Path] = [
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        pair[1],
        "-rawin",
        "-in",
        manifest_path(model),
    ]
    done = subprocess.run([openssl, *command, "-sigfile", signature_path(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    der = subprocess.run(
        [openssl, "pkey", "-pubin", "-in", pair[1], "-outform", "DER"], capture_output=True, check=True
    )
    (model.parent / "der").write_bytes(der.stdout)
    assert fingerprint(public_keys([pair[1]])[0]) == f"sha256:{sha256_of(model.parent / 'der')}"


@check_forms
def test_a_forged_pair_passes_without_keys_and_not_with_them(
    check: Callable[..., object], model: Path, other_model: Path, pair: tuple[Path, Path]
) -> None:
    """Who can write both files can make them agree: what only a signature tells."""
    sign_artifact(model, pair[0])
    other_model.replace(model)
    manifest_path(other_model).replace(manifest_path(model))
    check(model)
    with pytest.raises(SignatureRejected, match="the manifest was changed after it was signed"):
        check(model, [pair[1]])


def test_a_changed_artifact_under_a_signed_manifest_is_refused(model: Path, pair: tuple[Path, Path]) -> None:
    sign_artifact(model, pair[0])
    model.write_bytes(model.read_bytes()[::-1])
    for check in (verify_artifact, read_verified):
        with pytest.raises(ArtifactRejected, match="has sha256"):
            check(model, [pair[1]])
    with pytest.raises(ArtifactRejected, match="has sha256"):
        sign_artifact(model, pair[0])


def test_a_session_answers_only_for_a_signed_artifact(model: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureRejected, match="is not signed"):
        load(model, device="cpu", trusted_keys=[pair[1]])
    sign_artifact(model, pair[0])
    with load(model, device="cpu", trusted_keys=[pair[1]]) as session:
        assert session.info.signed
    with load(model, device="cpu") as session:
        assert not session.info.signed


def test_the_onnx_file_behind_a_plan_needs_a_signature_of_its_own(
    plan: Path, model: Path, pair: tuple[Path, Path]
) -> None:
    """Whether it answers because it was asked for, or because the plan cannot run here."""
    sign_artifact(plan, pair[0])
    options: list[dict[str, Any]] = [{"backend": "onnxruntime"}]
    options += [] if probe().gpus else [{"fallback": "onnxruntime"}]
    for option in options:
        signature_path(model).unlink(missing_ok=True)
        with pytest.raises(SignatureRejected, match=r"model\.fp32\.onnx is not signed"):
            load(plan, device="cpu", trusted_keys=[pair[1]], **option)
        sign_artifact(model, pair[0])
        load(plan, device="cpu", trusted_keys=[pair[1]], **option).close()


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 1_000_000])
def test_what_is_no_signature_is_refused(content: bytes, model: Path, pair: tuple[Path, Path]) -> None:
    signature_path(model).write_bytes(content)
    with pytest.raises(SignatureRejected, match=r"manifest\.sig"):
        verify_artifact(model, [pair[1]])


def test_every_flipped_bit_of_a_signature_is_refused(model: Path, pair: tuple[Path, Path]) -> None:
    sign_artifact(model, pair[0])
    good = signature_path(model).read_bytes()
    for bit in range(8 * len(good)):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        signature_path(model).write_bytes(content)
        with pytest.raises(SignatureRejected):
            check_signature(model, manifest_path(model).read_bytes(), [pair[1]])


def test_the_manifest_is_not_parsed_before_its_signature_holds(model: Path, pair: tuple[Path, Path]) -> None:
    sign_artifact(model, pair[0])
    manifest_path(model).write_bytes(b"no manifest")
    with pytest.raises(SignatureRejected):
        verify_artifact(model, [pair[1]])
    with pytest.raises(ArtifactRejected, match="not valid JSON"):
        verify_artifact(model)


def test_signing_again_gives_the_same_bytes_and_leaves_nothing_else(model: Path, pair: tuple[Path, Path]) -> None:
    first = sign_artifact(model, pair[0]).read_bytes()
    assert sign_artifact(model, pair[0]).read_bytes() == first
    assert len(first) == 64
    expected = sorted([model.name, manifest_path(model).name, signature_path(model).name])
    assert sorted(path.name for path in model.parent.iterdir()) == expected


def test_a_private_key_with_a_password(model: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    secret, public = write_key_pair(folder, b"open sesame")
    assert (is_encrypted(secret), is_encrypted(pair[0])) == (True, False)
    for path, password in ((secret, None), (secret, b"wrong"), (pair[0], b"of no use")):
        with pytest.raises(KeyRejected, match="cannot be used as a private key"):
            sign_artifact(model, path, password)
    sign_artifact(model, secret, b"open sesame")
    verify_artifact(model, [public])


def test_a_key_pair_is_readable_by_its_owner_and_never_overwritten(pair: tuple[Path, Path]) -> None:
    contents = [path.read_bytes() for path in pair]
    if sys.platform != "win32":
        assert stat.S_IMODE(pair[0].stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_key_pair(pair[0].parent)
    pair[1].rename(pair[1].with_name("elsewhere.pem"))
    with pytest.raises(FileExistsError):
        write_key_pair(pair[0].parent)
    assert not pair[1].exists()
    assert pair[0].read_bytes() == contents[0]


def test_what_is_no_public_key_is_refused(model: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "noise.pem").write_bytes(b"\xff" * 100)
    wrong: list[Any] = [
        pair[0],
        tmp_path / "noise.pem",
        tmp_path / "absent.pem",
        tmp_path,
        b"x" * 31,
        other_kind(tmp_path)[1],
    ]
    for key in wrong:
        with pytest.raises(KeyRejected):
            verify_artifact(model, [key])
    with pytest.raises(TypeError, match="give \\["):
        verify_artifact(model, str(pair[1]))


def test_what_is_no_private_key_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "noise.pem").write_bytes(b"\xff" * 100)
    for path in (pair[1], tmp_path / "noise.pem", tmp_path / "absent.pem", tmp_path, other_kind(tmp_path)[0]):
        with pytest.raises(KeyRejected):
            private_key(path)


def test_without_cryptography_the_command_to_install_it_is_named(
    model: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_artifact(model, pair[0])
    monkeypatch.setitem(sys.modules, "cryptography", None)
    verify_artifact(model)
    for attempt in (
        lambda: verify_artifact(model, [pair[1]]),
        lambda: sign_artifact(model, pair[0]),
        lambda: write_key_pair(model.parent),
    ):
        with pytest.raises(EnvironmentLacks, match=r"pip install 'tnm-pipeline\[sign\]'"):
            attempt()


def test_importing_engines_does_not_import_cryptography() -> None:
    code = "import sys, tnm_pipeline.engines; print('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_raw_key_is_the_key_of_the_file(pair: tuple[Path, Path]) -> None:
    [key] = public_keys([pair[1]])
    assert isinstance(key, Ed25519PublicKey)
    assert fingerprint(public_keys([key.public_bytes_raw()])[0]) == fingerprint(key)
