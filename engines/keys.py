"""Ed25519 keys in PEM files, as `openssl genpkey -algorithm ed25519` writes them.

`cryptography` is imported when a key is used: an application that asks for no signature needs it not.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tnm_pipeline.engines.errors import EnvironmentLacks, KeyRejected

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TrustedKey: TypeAlias = str | Path | bytes
"""A public key: a PEM file, or its 32 bytes."""

PRIVATE, PUBLIC = "signing-key.pem", "signing-key.pub.pem"
_LARGEST_FILE = 1 << 16


def public_keys(keys: Sequence[TrustedKey]) -> "list[Ed25519PublicKey]":
    """Load the keys whose signatures are accepted.

    Args:
        keys: At least one PEM file (`-----BEGIN PUBLIC KEY-----`) or 32 bytes.

    Raises:
        KeyRejected: There is none, or one of them is missing or no public Ed25519 key.
        EnvironmentLacks: `cryptography` is not installed.
        TypeError: A single key was given instead of a sequence of them.
    """
    if isinstance(keys, str | bytes | Path):
        raise TypeError(f"trusted_keys is a sequence of keys: give [{keys!r}]")
    if not keys:
        raise KeyRejected("no key is trusted: name at least one, or ask for no signature with None")
    return [_public_key(key) for key in keys]


def private_key(path: Path, password: bytes | None = None) -> "Ed25519PrivateKey":
    """Load a key to sign with.

    Args:
        path: A PEM file, encrypted or not.
        password: Of an encrypted one.

    Raises:
        KeyRejected: It is missing or no private Ed25519 key, or the password is wrong, lacking or of no use.
        EnvironmentLacks: `cryptography` is not installed.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _content(path)
    try:
        key = load_pem_private_key(content, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: a password too many or too few
        raise KeyRejected(f"{path} cannot be used as a private key: {error}. {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyRejected(f"{path} holds another kind of private key than Ed25519. {_MAKE}")
    return key


def is_encrypted(path: Path) -> bool:
    """Whether a private key needs a password, by the PEM label that says so.

    Raises:
        KeyRejected: The file is missing or cannot be read.
    """
    return b"ENCRYPTED" in _content(path)


def write_key_pair(folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """Make a key pair.

    Args:
        folder: Where `signing-key.pem` (readable by its owner only) and `signing-key.pub.pem` go. It exists.
        password: Encrypts the private key; None leaves it open.

    Returns:
        The private and the public file.

    Raises:
        FileExistsError: One of the two is there. No key is ever overwritten.
        OSError: The folder is missing, read-only or full.
        EnvironmentLacks: `cryptography` is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    encryption = form.NoEncryption() if password is None else form.BestAvailableEncryption(password)
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    private_file, public_file = folder / PRIVATE, folder / PUBLIC
    _create(public_file, public, 0o644)
    try:
        _create(private_file, secret, 0o600)
    except BaseException:
        public_file.unlink()
        raise
    return private_file, public_file


def fingerprint(key: "Ed25519PublicKey") -> str:
    """How to name a key: `sha256:` and the hash of its DER form.

    The same as `openssl pkey -pubin -in key.pem -outform DER | sha256sum`.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return "sha256:" + hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


_MAKE = "Make a key pair with `tnm-pipeline engines keygen FOLDER`"


def _public_key(key: TrustedKey) -> "Ed25519PublicKey":
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if isinstance(key, bytes):
        if len(key) != 32:
            raise KeyRejected(f"a trusted key in bytes has {len(key)} of them, and Ed25519 has 32; or give a PEM file")
        return Ed25519PublicKey.from_public_bytes(key)
    content = _content(Path(key))
    try:
        loaded = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyRejected(f"{key} is no public key: {error}. {_MAKE}") from error
    if not isinstance(loaded, Ed25519PublicKey):
        raise KeyRejected(f"{key} holds another kind of public key than Ed25519. {_MAKE}")
    return loaded


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE)
    except OSError as error:
        raise KeyRejected(f"the key {path} cannot be read: {error.strerror}. {_MAKE}") from error


def _create(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not exist, with its final permissions from the start."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # of Windows, which else adds returns
    descriptor = os.open(path, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401  # asked for by name, so that the complaint can say what to install
    except ImportError as error:
        raise EnvironmentLacks(
            f"signatures need the package cryptography: {error}. Run `pip install 'tnm-pipeline[sign]'`"
        ) from error
