"""`tnm-pipeline engines`: what is known of artifacts and whether it holds. Checking loads no runtime."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tnm_pipeline.engines import ArtifactRejected, EnvironmentLacks, Manifest, RunFailed, TensorSpec, verify_artifact
from tnm_pipeline.engines.artifact import manifest_path, read_manifest
from tnm_pipeline.engines.keys import TrustedKey
from tnm_pipeline.engines.machine import check_machine
from tnm_pipeline.engines.manifest import Ranges
from tnm_pipeline.engines.signature import check_signature, signature_path
from tnm_pipeline.pipeline.errors import exit_code
from tnm_pipeline.pipeline.source import source_of
from tnm_pipeline.pipeline.tables import new_console

_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Checked:
    """One artifact.

    Attributes:
        path: The file.
        manifest: What is stated of it; None where that was refused.
        signature: What is known of its signature.
        source: What is known of the ONNX file that a plan was built from; empty for an ONNX file.
        here: Whether it belongs on this machine.
        ran: What was found when it was loaded and run; empty where it was only checked.
        refused: What is wrong; None where all is well.
    """

    path: Path
    manifest: Manifest | None = None
    signature: str = ""
    source: str = ""
    here: str = ""
    ran: tuple[str, ...] = ()
    refused: Exception | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "path": str(self.path),
            "refused": None if self.refused is None else str(self.refused),
            "manifest": None if self.manifest is None else json.loads(self.manifest.to_json()),
            "signature": self.signature,
            "source": self.source,
            "here": self.here,
            "ran": list(self.ran),
        }


def artifacts_in(path: Path) -> list[Path]:
    """An artifact itself, or all in a folder and the folders in it: what has a manifest, and what should have one.

    Raises:
        ArtifactRejected: The folder holds none.
    """
    if not path.is_dir():
        return [path]
    named = {file.with_name(file.name.removesuffix(_SUFFIX)) for file in path.rglob(f"*{_SUFFIX}")}
    found = named.union(path.rglob("*.onnx"), path.rglob("*.plan"))
    shown = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not shown:
        raise ArtifactRejected(f"{path} holds no artifact: write some with `tnm-pipeline export`")
    return shown


def check_artifact(path: Path, trusted: Sequence[TrustedKey] | None) -> Checked:
    """Check manifest, hashes, files beside it, and signatures where keys are given. A plan's ONNX file counts.

    Args:
        path: An artifact.
        trusted: Public keys of which one must have signed; None: signatures are not checked.

    Raises:
        KeyRejected: A trusted key is none.
        EnvironmentLacks: Keys were given and `cryptography` is not installed.
        OSError: A file cannot be read.
    """
    try:
        manifest = verify_artifact(path, trusted)
        return Checked(
            path,
            manifest,
            signature=_signature(path, trusted),
            source="" if manifest.source_onnx is None else _source(path, manifest, trusted),
            here=_here(manifest),
        )
    except ArtifactRejected as error:
        return Checked(path, refused=error)


def run_artifact(
    checked: Checked, fallback: Literal["error", "onnxruntime"], trusted: Sequence[TrustedKey] | None
) -> Checked:
    """Load and run what was found to be in order, as `tnm-pipeline verify` does, with the same keys."""
    from tnm_pipeline.export.errors import ExportRejected
    from tnm_pipeline.pipeline.inspect import verify_file

    if checked.refused is not None:
        return checked
    try:
        return replace(checked, ran=tuple(verify_file(checked.path, fallback, trusted).lines))
    except (ArtifactRejected, EnvironmentLacks, ExportRejected, RunFailed) as error:
        return replace(checked, refused=error)


def unsigned_source(plan: Path) -> Path | None:
    """The ONNX file behind a plan, where it is there without a signature; None otherwise."""
    name = read_manifest(plan).source_onnx
    source = None if name is None else plan.parent / name
    return source if source is not None and source.is_file() and not signature_path(source).exists() else None


def refusal(checked: Sequence[Checked]) -> Exception | None:
    """The gravest of what was found, to be raised: rejected before not runnable here; None where all is well."""
    errors = [item.refused for item in checked if item.refused is not None]
    if not errors:
        return None
    gravest = min(errors, key=exit_code)
    if len(checked) > 1:
        gravest.add_note(f"{len(errors)} of {len(checked)} artifacts were refused")
    return gravest


def show(checked: Sequence[Checked]) -> None:
    """Print a table for each artifact on stdout, one fact a line, however narrow the terminal is."""
    console = new_console()
    for item in checked:
        console.print(f"{item.path}: {'REFUSED' if item.refused else 'in order'}")
        for label, text in _rows(item):
            console.print(f"  {label:<15} {text if text.isprintable() else ascii(text)}")


def _rows(item: Checked) -> Iterator[tuple[str, str]]:
    if item.refused is not None:
        yield "refused", str(item.refused)
    manifest = item.manifest
    if manifest is None:
        return
    kind = "ONNX file" if manifest.backend == "onnxruntime" else f"{manifest.backend} plan"
    writer = "onnx" if manifest.backend == "onnxruntime" else manifest.backend
    yield "artifact", f"{kind}, {manifest.precision}, {manifest.bytes:,} bytes, by {writer} {manifest.backend_version}"
    yield "sha256", f"{manifest.sha256}, as in the manifest"
    for file in manifest.external:
        yield "weights", f"{file.name}, {file.bytes:,} bytes, sha256 as in the manifest"
    yield "signature", item.signature
    for label, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            yield label, _tensor(spec)
    for index, profile in enumerate(manifest.profiles):
        yield f"profile {index}", _ranges(profile)
    if manifest.compute_capabilities:
        yield "GPUs", f"compute capability {', '.join(manifest.compute_capabilities)}"
    if manifest.gpu is not None:
        yield "built on", f"{manifest.gpu}, driver {manifest.driver}"
    yield "here", item.here
    if item.source:
        yield "source", item.source
    if manifest.sparse_weights_flag is not None:
        yield "sparse tactics", "allowed" if manifest.sparse_weights_flag else "not allowed"
    for label, facts in (("sparsity", manifest.sparsity), ("provenance", manifest.provenance)):
        yield from ((label, line) for line in _brief(facts))
    for line in item.ran:
        yield "ran", line


def _signature(path: Path, trusted: Sequence[TrustedKey] | None) -> str:
    if trusted is not None:
        return f"by {check_signature(path, manifest_path(path).read_bytes(), trusted)}, which is trusted"
    if signature_path(path).exists():
        return "present, not checked: give --trusted KEY.pem"
    return "none"


def _source(path: Path, manifest: Manifest, trusted: Sequence[TrustedKey] | None) -> str:
    if not (path.parent / str(manifest.source_onnx)).is_file():
        return f"{manifest.source_onnx} is not here: the plan runs, and has nothing to fall back to"
    verify_artifact(source_of(path, manifest), trusted)
    return f"{manifest.source_onnx}, the one it was built from" + ("" if trusted is None else ", signed too")


def _here(manifest: Manifest) -> str:
    try:
        check_machine(manifest)
    except EnvironmentLacks as error:
        return f"no: {error}"
    if manifest.operating_system is None:
        return "any operating system and CPU"
    return f"{manifest.operating_system} on {manifest.cpu_architecture}, as this machine"


def _tensor(spec: TensorSpec) -> str:
    shape = " x ".join(str(size) for size in spec.shape) or "one number"
    return f"{spec.name}: {spec.dtype}, {shape}" + (f"; {_ranges(spec.ranges)}" if spec.ranges else "")


def _ranges(ranges: Ranges) -> str:
    return ", ".join(f"{dim} {low} to {high}, best {best}" for dim, (low, best, high) in ranges.items())


def _brief(facts: Mapping[str, object], inside: str = "") -> Iterator[str]:
    """One line a fact, and of what has no end only how much there is; `--json` shows all of it."""
    for key, value in facts.items():
        if not isinstance(value, dict):
            yield f"{inside}{key}: {f'{len(value)} entries' if isinstance(value, list) else value}"
        elif isinstance(value.get("summary"), str):
            yield f"{inside}{key}: {value['summary']}"
        elif any(isinstance(item, dict) for item in value.values()):
            yield from _brief(value, f"{inside}{key} ")
        elif len(value) > 5:
            yield f"{inside}{key}: {len(value)} entries"
        else:
            yield f"{inside}{key}: {', '.join(f'{name} = {item}' for name, item in value.items())}"
