"""`tnm-pipeline engines`: check, verify and sign what goes into production."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tnm_pipeline.pipeline.options import FallbackOption, JsonOption, PasswordOption, TrustedOption
from tnm_pipeline.pipeline.output import print_json

if TYPE_CHECKING:
    from tnm_pipeline.pipeline.checking import Checked

app = typer.Typer(help="Check, verify and sign artifacts before they go into production.", no_args_is_help=True)

ArtifactArgument = Annotated[Path, typer.Argument(help="An .onnx or .plan file, or a folder: all that are in it.")]


@app.command()
def check(artifact: ArtifactArgument, trusted: TrustedOption = None, as_json: JsonOption = False) -> None:
    """Manifest, hashes, weights beside it, signature: what is known, without loading a runtime."""
    from tnm_pipeline.pipeline.checking import artifacts_in, check_artifact

    _report([check_artifact(path, trusted) for path in artifacts_in(artifact)], as_json)


@app.command()
def verify(
    artifact: ArtifactArgument,
    trusted: TrustedOption = None,
    fallback: FallbackOption = "error",
    as_json: JsonOption = False,
) -> None:
    """Check, count the sparsity again, load it here and run it once."""
    from tnm_pipeline.pipeline.checking import artifacts_in, check_artifact, run_artifact

    checked = (check_artifact(path, trusted) for path in artifacts_in(artifact))
    _report([run_artifact(item, fallback, trusted) for item in checked], as_json)


@app.command()
def sign(
    artifact: ArtifactArgument,
    key: Annotated[Path, typer.Option("--key", help="Private Ed25519 key, a PEM file.")],
    password_file: PasswordOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an artifact and sign its manifest; writes ARTIFACT.manifest.sig."""
    from tnm_pipeline.engines import sign_artifact
    from tnm_pipeline.engines.keys import fingerprint, private_key
    from tnm_pipeline.pipeline.checking import artifacts_in, unsigned_source

    password = _password(key, password_file)
    signer = fingerprint(private_key(key, password).public_key())
    written = [(path, sign_artifact(path, key, password)) for path in artifacts_in(artifact)]
    if as_json:
        print_json({"key": signer, "signatures": [str(signature) for _, signature in written]})
    for path, signature in written:
        if not as_json:
            sys.stdout.write(f"{signature}: by {signer}\n")
        if source := unsigned_source(path):
            sys.stderr.write(f"{source} is not signed: sign it too if {path.name} may fall back to it\n")


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(help="Where the two keys go; made if it is not there.")],
    password_file: PasswordOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key pair: signing-key.pem to keep secret, signing-key.pub.pem to give to those who load."""
    from tnm_pipeline.engines.keys import PRIVATE, PUBLIC, fingerprint, public_keys, write_key_pair
    from tnm_pipeline.pipeline.errors import ConfigError

    for name in (PRIVATE, PUBLIC):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is there, and no key is overwritten: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    private, public = write_key_pair(folder, None if password_file is None else _first_line(password_file))
    [key] = public_keys([public])
    if as_json:
        print_json({"private": str(private), "public": str(public), "key": fingerprint(key)})
    else:
        sys.stdout.write(f"{private}: keep it secret\n{public}: {fingerprint(key)}\n")


def _report(checked: "Sequence[Checked]", as_json: bool) -> None:
    from tnm_pipeline.pipeline.checking import refusal, show

    if as_json:
        print_json([item.to_dict() for item in checked])
    else:
        show(checked)
    if (error := refusal(checked)) is not None:
        raise error


def _password(key: Path, file: Path | None) -> bytes | None:
    """From a file, or asked for where the key needs one and somebody is there to answer."""
    from tnm_pipeline.engines.keys import is_encrypted

    if file is not None:
        return _first_line(file)
    if not is_encrypted(key) or not sys.stdin.isatty():
        return None
    answer: str = typer.prompt(f"password of {key}", hide_input=True, err=True)
    return answer.encode()


def _first_line(file: Path) -> bytes:
    from tnm_pipeline.pipeline.errors import ConfigError

    try:
        line = file.read_bytes().partition(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise ConfigError(f"--password-file {file} cannot be read: {error.strerror}") from error
    if not line:
        raise ConfigError(f"--password-file {file} begins with an empty line: write the password there")
    return line
