"""What a run exported, as a model of a Triton Inference Server repository."""

import json
from pathlib import Path

from tnm_pipeline.engines.artifact import read_manifest
from tnm_pipeline.export.triton import check_name, write_repository
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.stages import RESULT
from tnm_pipeline.pipeline.twins import ENGINE


def check_model_name(config: Config) -> None:
    """Refuse a run folder whose name cannot be a model's.

    Raises:
        RepositoryError: It cannot.
    """
    check_name(config.run.folder.resolve().name)


def add_to_repository(config: Config, repository: Path) -> str:
    """Add the engine of a run, or its ONNX file where Triton cannot load the engine, as the next version of a model.

    Args:
        config: Of a run that exported; the model is called like its folder.
        repository: Made if it does not exist.

    Returns:
        What was added, and why it is not the engine, as a line for a person.

    Raises:
        RepositoryError: See `tnm_pipeline.export.triton.write_repository`, like the others.
    """
    folder = config.run.folder
    ranges = json.loads((folder / "export" / RESULT).read_text(encoding="utf-8"))["ranges"]
    sizes = {dim: usual for dim, (_, usual, _) in ranges.items()}
    artifact, why = _artifact(config)
    version = write_repository(repository, folder.resolve().name, artifact, sizes=sizes)
    return f"Triton model: {version}, from {artifact}{why}"


def _artifact(config: Config) -> tuple[Path, str]:
    """The engine if Triton has a backend for it, else the ONNX file; bf16 has few kernels in ONNX Runtime."""
    folder = config.run.folder
    engine = folder / "build" / ENGINE
    if config.trt.enabled and read_manifest(engine).backend == "tensorrt":
        return engine, ""
    half = "fp16" in config.export.precisions and config.trt.precision == "fp16"
    why = " (Triton has no backend for plans of TensorRT for RTX)" if config.trt.enabled else ""
    return folder / "export" / f"model.{'fp16' if half else 'fp32'}.onnx", why
