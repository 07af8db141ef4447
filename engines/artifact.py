"""Artifacts on disk with `<artifact file name>.manifest.json` beside them, checked before any runtime sees a byte.

A plan is native code and an ONNX file configures native code, so neither is handed to a runtime before its bytes match
the SHA-256 recorded when it was written. Where trusted keys are given, nothing at all is believed, the manifest
included, before a signature by one of them holds.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tnm_pipeline.engines import decode, strict_json
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.engines.keys import TrustedKey, private_key
from tnm_pipeline.engines.manifest import ExternalFile, Manifest
from tnm_pipeline.engines.signature import check_signature, signature_path

_SUFFIX = ".manifest.json"


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of `artifact` lives: beside it, with `.manifest.json` appended."""
    return artifact.with_name(artifact.name + _SUFFIX)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(artifact: Path, manifest: Manifest) -> Path:
    """Write the manifest beside its artifact; a kill leaves the old file or the new one, never half of one.

    Args:
        artifact: The file that `manifest` describes; it need not exist yet.
        manifest: What to write.

    Returns:
        The path written.

    Raises:
        ArtifactRejected: `manifest.artifact` is another file name.
        OSError: The folder is missing, read-only or full.
    """
    decode.require(
        manifest.artifact == artifact.name,
        f"a manifest of {manifest.artifact!r} cannot describe {artifact.name!r}",
    )
    text = manifest.to_json()
    Manifest.from_json(text)  # nothing is written that could not be read: free-form facts may be too deep or too large
    target = manifest_path(artifact)
    _replace(target, text.encode())
    return target


def read_manifest(artifact: Path, trusted_keys: Sequence[TrustedKey] | None = None) -> Manifest:
    """Read the manifest beside `artifact` without looking at the artifact's bytes.

    Args:
        artifact: The file that the manifest describes.
        trusted_keys: Public keys of which one must have signed the manifest; None: signatures are not looked at.

    Returns:
        A manifest whose digest, schema and types hold and whose `artifact` is this file's name.

    Raises:
        SignatureRejected: Keys were given, and none of them signed it.
        ArtifactRejected: The manifest is missing, unreadable, edited, or describes another file.
        KeyRejected: A trusted key is none.
        EnvironmentLacks: Keys were given and `cryptography` is not installed.
    """
    content = _manifest_bytes(artifact)
    if trusted_keys is not None:
        check_signature(artifact, content, trusted_keys)
    return _parse(artifact, content)


def verify_artifact(artifact: Path, trusted_keys: Sequence[TrustedKey] | None = None) -> Manifest:
    """Check an artifact against the manifest beside it.

    Without trusted keys this finds damage and careless edits. Somebody who can write both files can make them agree on
    anything: only a signature tells that apart.

    Args:
        artifact: An ONNX file or a plan.
        trusted_keys: Public keys of which one must have signed the manifest; None: signatures are not looked at. The
            ONNX file behind a plan has a manifest and a signature of its own.

    Returns:
        The manifest.

    Raises:
        SignatureRejected: Keys were given, and none of them signed it.
        ArtifactRejected: A file is missing, the manifest does not hold, or size or SHA-256 differ (both sides are
            named). The files that hold weights beside an ONNX artifact count.
        KeyRejected: A trusted key is none.
        EnvironmentLacks: Keys were given and `cryptography` is not installed.
        OSError: The artifact cannot be read.
    """
    _require_file(artifact)
    manifest = read_manifest(artifact, trusted_keys)
    _match_files(artifact, manifest)
    return manifest


def sign_artifact(artifact: Path, key: Path, password: bytes | None = None) -> Path:
    """Sign an artifact that holds what its manifest says.

    Args:
        artifact: An ONNX file or a plan. The ONNX file behind a plan is signed separately.
        key: A private Ed25519 key in a PEM file.
        password: Of an encrypted key.

    Returns:
        The file written beside it. Signing again with the same key gives the same bytes.

    Raises:
        ArtifactRejected: As `verify_artifact`.
        KeyRejected: No such key, or the password does not open it.
        EnvironmentLacks: `cryptography` is not installed.
        OSError: The folder is read-only or full.
    """
    signer = private_key(key, password)
    _require_file(artifact)
    content = _manifest_bytes(artifact)
    _match_files(artifact, _parse(artifact, content))
    target = signature_path(artifact)
    _replace(target, signer.sign(content))
    return target


@dataclass(frozen=True)
class Content:
    """An artifact as it was when its hashes were checked: nobody can swap a file afterwards.

    Attributes:
        manifest: What stands beside it.
        artifact: The bytes of the artifact.
        external: The bytes of the files beside an ONNX artifact that hold weights, by name.
    """

    manifest: Manifest
    artifact: bytes
    external: Mapping[str, bytes]


def read_verified(artifact: Path, trusted_keys: Sequence[TrustedKey] | None = None) -> Content:
    """Like `verify_artifact`, returning the very bytes that were hashed.

    Args:
        artifact: An ONNX file or a plan.
        trusted_keys: As `verify_artifact`.

    Raises:
        ArtifactRejected: As `verify_artifact`, `SignatureRejected` included.
        KeyRejected: A trusted key is none.
        EnvironmentLacks: Keys were given and `cryptography` is not installed.
        OSError: A file cannot be read.
    """
    _require_file(artifact)
    manifest = read_manifest(artifact, trusted_keys)
    content = _read(artifact, manifest)
    external = {file.name: _read(_external_path(artifact, file), file) for file in manifest.external}
    return Content(manifest, content, external)


def _require_file(artifact: Path) -> None:
    decode.require(artifact.is_file(), f"{artifact} is not a file. {_rebuild(artifact)}")


def _manifest_bytes(artifact: Path) -> bytes:
    path = manifest_path(artifact)
    if not path.exists() and artifact.name.endswith(_SUFFIX):
        described = artifact.with_name(artifact.name.removesuffix(_SUFFIX))
        raise ArtifactRejected(f"{artifact} is a manifest: give the artifact that it describes, {described}")
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise ArtifactRejected(f"{path} cannot be read: it is not a file. {_rebuild(artifact)}")
        with path.open("rb") as file:
            content = file.read(strict_json.MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ArtifactRejected(
            f"{path} is missing, so {artifact.name} cannot be trusted. {_rebuild(artifact)}"
        ) from error
    except OSError as error:
        raise ArtifactRejected(f"{path} cannot be read: {error}. {_rebuild(artifact)}") from error
    if len(content) > strict_json.MAX_BYTES:
        raise ArtifactRejected(f"{path} has more than {strict_json.MAX_BYTES:,} bytes. {_rebuild(artifact)}")
    return content


def _parse(artifact: Path, content: bytes) -> Manifest:
    path = manifest_path(artifact)
    try:
        manifest = Manifest.from_json(content.decode())
        decode.require(manifest.artifact == artifact.name, f"describes {manifest.artifact!r}, not {artifact.name!r}")
    except UnicodeDecodeError as error:
        raise ArtifactRejected(f"{path} cannot be read: {error}. {_rebuild(artifact)}") from error
    except ArtifactRejected as error:
        raise ArtifactRejected(f"{path}: {error}. {_rebuild(artifact)}") from error
    return manifest


def _replace(target: Path, content: bytes) -> None:
    """Write a file in one step: a kill leaves the old one or the new one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _match(path: Path, stated: Manifest | ExternalFile, size: int, sha256: Callable[[], str]) -> None:
    """Compare size, then hash: the size is cheaper and names a truncation for what it is."""
    decode.require(
        size == stated.bytes,
        f"{path} has {size} bytes, its manifest states {stated.bytes}. {_rebuild(path)}",
    )
    actual = sha256()
    decode.require(
        actual == stated.sha256,
        f"{path} has sha256 {actual}, its manifest states {stated.sha256}. {_rebuild(path)}",
    )


def _match_files(artifact: Path, manifest: Manifest) -> None:
    _match(artifact, manifest, artifact.stat().st_size, partial(sha256_of, artifact))
    for file in manifest.external:
        path = _external_path(artifact, file)
        _match(path, file, path.stat().st_size, partial(sha256_of, path))


def _read(path: Path, stated: Manifest | ExternalFile) -> bytes:
    """No more bytes than the manifest states, whatever has become of the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(stated.bytes) if size == stated.bytes else b""
    _match(path, stated, size, lambda: hashlib.sha256(content).hexdigest())
    return content


def _external_path(artifact: Path, file: ExternalFile) -> Path:
    path = artifact.with_name(file.name)
    decode.require(path.is_file(), f"{path} is missing, and {artifact.name} keeps weights in it. {_rebuild(artifact)}")
    return path


def _rebuild(artifact: Path) -> str:
    command = "tnm-pipeline export --trt" if artifact.suffix == ".plan" else "tnm-pipeline export"
    return f"Write both files again with `{command}`, or copy them together from where they were written"
