"""A dense or unstructured checkpoint becomes N:M by layerwise optimisation, without training."""

from tnm_pipeline.training.convert.batch import Batch, CalibrationError
from tnm_pipeline.training.convert.held_out import LayerError, layer_errors, mean_errors
from tnm_pipeline.training.convert.journal import JournalError
from tnm_pipeline.training.convert.methods import METHODS, MethodError
from tnm_pipeline.training.convert.reorder import reorder
from tnm_pipeline.training.convert.result import Conversion, ConvertedLayer
from tnm_pipeline.training.convert.runner import convert, plan_for

__all__ = [
    "METHODS",
    "Batch",
    "CalibrationError",
    "Conversion",
    "ConvertedLayer",
    "JournalError",
    "LayerError",
    "MethodError",
    "convert",
    "layer_errors",
    "mean_errors",
    "plan_for",
    "reorder",
]
