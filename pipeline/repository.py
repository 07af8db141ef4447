"""What a run exported, as a model of a Triton Inference Server repository."""

import json
from pathlib import Path

from tnm_pipeline.engines.artifact import read_manifest
from tnm_pipeline.export.triton import write_repository
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.stages import RESULT
from tnm_pipeline.pipeline.twins import ENGINE


def add_to_repository(config: Config, repository: Path) -> Path:
    """Add the engine of a run, or its ONNX file where Triton cannot load the engine, as the next version of a model.

    Args:
        config: Of a run that exported; the model is called like its folder.
        repository: Made if it does not exist.

    Returns:
        The folder of the version.

    Raises:
        RepositoryError: See `tnm_pipeline.export.triton.write_repository`, like the others.
    """
    folder = config.run.folder
    ranges = json.loads((folder / "export" / RESULT).read_text(encoding="utf-8"))["ranges"]
    sizes = {dim: usual for dim, (_, usual, _) in ranges.items()}
    return write_repository(repository, folder.resolve().name, _artifact(config), sizes=sizes)


def _artifact(config: Config) -> Path:
    """TensorRT for RTX has no Triton backend, and bf16 few kernels in ONNX Runtime."""
    folder = config.run.folder
    engine = folder / "build" / ENGINE
    if config.trt.enabled and read_manifest(engine).backend == "tensorrt":
        return engine
    half = "fp16" in config.export.precisions and config.trt.precision == "fp16"
    return folder / "export" / f"model.{'fp16' if half else 'fp32'}.onnx"
