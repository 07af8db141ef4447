"""The ONNX file that a plan was built from, and what is taken for an artifact and is none."""

from pathlib import Path

from tnm_pipeline.engines import ArtifactRejected, Manifest
from tnm_pipeline.engines.artifact import sha256_of

_CHECKPOINTS = (".safetensors", ".pt", ".pth")


def refuse_checkpoint(path: Path) -> None:
    """Say which command reads a checkpoint, where an artifact is wanted.

    Raises:
        ArtifactRejected: The file is called as checkpoints are.
    """
    if path.suffix in _CHECKPOINTS:
        raise ArtifactRejected(
            f"{path} is a checkpoint: `tnm-pipeline inspect {path}` counts what it holds, and `tnm-pipeline export "
            f"{path}` writes the ONNX file"
        )


def source_of(plan: Path, manifest: Manifest) -> Path:
    """Find the file by the name that the manifest states, and know it by its hash.

    Args:
        plan: The plan.
        manifest: Its manifest.

    Raises:
        ArtifactRejected: None is named, or the file is missing or another one.
    """
    if manifest.source_onnx is None:
        raise ArtifactRejected(
            f"the manifest of {plan} names no ONNX file that it was built from: build it with "
            "`tnm-pipeline export --trt`, or give the ONNX file itself"
        )
    source = plan.parent / manifest.source_onnx
    if not source.is_file():
        raise ArtifactRejected(f"{source} is missing, from which {plan.name} was built: put it back, or build again")
    if (found := sha256_of(source)) != manifest.source_sha256:
        raise ArtifactRejected(
            f"{source} has sha256 {found}, and {plan.name} was built from {manifest.source_sha256}: restore that file, "
            "or build the plan again from this one with `tnm-pipeline export --trt`"
        )
    return source
