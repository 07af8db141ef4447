"""Detached Ed25519 signatures of manifests.

What is signed is the manifest file, byte for byte. It holds the SHA-256 of the artifact, of the files with its larger
weights and of the ONNX file behind a plan, so one signature covers them all. `<artifact>.manifest.sig` is the 64 bytes
of the signature and nothing else: there is nothing to parse before it is checked, and OpenSSL can check it as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tnm_pipeline.engines.errors import SignatureRejected
from tnm_pipeline.engines.keys import TrustedKey, fingerprint, public_keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

BYTES = 64


def signature_path(artifact: Path) -> Path:
    """Where the signature of `artifact`'s manifest lives: beside both, with `.manifest.sig` appended."""
    return artifact.with_name(artifact.name + ".manifest.sig")


def check_signature(artifact: Path, manifest: bytes, trusted_keys: Sequence[TrustedKey]) -> str:
    """Check the signature beside an artifact.

    Args:
        artifact: The artifact; its own bytes are not looked at.
        manifest: The bytes of its manifest file.
        trusted_keys: Public keys of which one must have signed.

    Returns:
        The fingerprint of the one that did.

    Raises:
        SignatureRejected: There is no signature, or none of these keys made it of these bytes.
        KeyRejected: A trusted key is none.
        EnvironmentLacks: `cryptography` is not installed.
    """
    keys = public_keys(trusted_keys)
    signature = _read(artifact, keys)
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        try:
            key.verify(signature, manifest)
        except InvalidSignature:
            continue
        return fingerprint(key)
    raise SignatureRejected(
        f"{signature_path(artifact)} is of another key than {_named(keys)}, or the manifest was changed after it was "
        f"signed. {_sign(artifact)}, or trust the key that signed it"
    )


def _read(artifact: Path, keys: "list[Ed25519PublicKey]") -> bytes:
    path = signature_path(artifact)
    if not path.is_file():
        raise SignatureRejected(
            f"{artifact} is not signed: {path.name} is missing, and a signature by {_named(keys)} is demanded. "
            f"{_sign(artifact)}"
        )
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except OSError as error:
        raise SignatureRejected(f"{path} cannot be read: {error}. {_sign(artifact)}") from error
    if len(content) != BYTES:
        size = len(content) if len(content) < BYTES else f"more than {BYTES}"
        raise SignatureRejected(f"{path} has {size} bytes, and a signature has {BYTES}. {_sign(artifact)}")
    return content


def _named(keys: "list[Ed25519PublicKey]") -> str:
    return " or ".join(map(fingerprint, keys))


def _sign(artifact: Path) -> str:
    return f"If you vouch for it, sign it with `tnm-pipeline engines sign {artifact} --key KEY.pem`"
