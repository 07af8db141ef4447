"""Artifacts on disk with `<artifact file name>.manifest.json` beside them, checked before any runtime sees a byte.

A plan is native code and an ONNX file configures native code, so neither is handed to a runtime before its bytes match
the SHA-256 recorded when it was written.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tnm_pipeline.engines import decode
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.engines.manifest import ExternalFile, Manifest


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of `artifact` lives: beside it, with `.manifest.json` appended."""
    return artifact.with_name(artifact.name + ".manifest.json")


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
    target = manifest_path(artifact)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_manifest(artifact: Path) -> Manifest:
    """Read the manifest beside `artifact` without looking at the artifact's bytes.

    Args:
        artifact: The file that the manifest describes.

    Returns:
        A manifest whose digest, schema and types hold and whose `artifact` is this file's name.

    Raises:
        ArtifactRejected: The manifest is missing, unreadable, edited, or describes another file.
    """
    path = manifest_path(artifact)
    try:
        manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        decode.require(manifest.artifact == artifact.name, f"describes {manifest.artifact!r}, not {artifact.name!r}")
    except FileNotFoundError as error:
        raise ArtifactRejected(
            f"{path} is missing, so {artifact.name} cannot be trusted. {_rebuild(artifact)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactRejected(f"{path} cannot be read: {error}. {_rebuild(artifact)}") from error
    except ArtifactRejected as error:
        raise ArtifactRejected(f"{path}: {error}. {_rebuild(artifact)}") from error
    return manifest


def verify_artifact(artifact: Path) -> Manifest:
    """Check an artifact against the manifest beside it.

    Args:
        artifact: An ONNX file or a plan.

    Returns:
        The manifest.

    Raises:
        ArtifactRejected: A file is missing, the manifest does not hold, or size or SHA-256 differ (both sides are
            named). The files that hold weights beside an ONNX artifact count.
        OSError: The artifact cannot be read.
    """
    manifest = _manifest_of_existing(artifact)
    _match(artifact, manifest, artifact.stat().st_size, lambda: sha256_of(artifact))
    _match_external(artifact, manifest)
    return manifest


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


def read_verified(artifact: Path) -> Content:
    """Like `verify_artifact`, returning the very bytes that were hashed.

    Args:
        artifact: An ONNX file or a plan.

    Raises:
        ArtifactRejected: As `verify_artifact`.
        OSError: A file cannot be read.
    """
    manifest = _manifest_of_existing(artifact)
    content = artifact.read_bytes()
    _match(artifact, manifest, len(content), lambda: hashlib.sha256(content).hexdigest())
    external = {file.name: _read_external(artifact, file) for file in manifest.external}
    return Content(manifest, content, external)


def _manifest_of_existing(artifact: Path) -> Manifest:
    decode.require(artifact.is_file(), f"{artifact} is not a file. {_rebuild(artifact)}")
    return read_manifest(artifact)


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


def _match_external(artifact: Path, manifest: Manifest) -> None:
    for file in manifest.external:
        path = _external_path(artifact, file)
        _match(path, file, path.stat().st_size, partial(sha256_of, path))


def _read_external(artifact: Path, file: ExternalFile) -> bytes:
    path = _external_path(artifact, file)
    content = path.read_bytes()
    _match(path, file, len(content), lambda: hashlib.sha256(content).hexdigest())
    return content


def _external_path(artifact: Path, file: ExternalFile) -> Path:
    path = artifact.with_name(file.name)
    decode.require(path.is_file(), f"{path} is missing, and {artifact.name} keeps weights in it. {_rebuild(artifact)}")
    return path


def _rebuild(artifact: Path) -> str:
    command = "tnm-pipeline export --trt" if artifact.suffix == ".plan" else "tnm-pipeline export"
    return f"Write both files again with `{command}`, or copy them together from where they were written"
