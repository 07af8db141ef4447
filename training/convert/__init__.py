"""A dense or unstructured checkpoint becomes N:M by layerwise optimisation, without training."""

from tnm_pipeline.training.convert.calibration import CalibrationError
from tnm_pipeline.training.convert.held_out import layer_errors
from tnm_pipeline.training.convert.methods import METHODS
from tnm_pipeline.training.convert.runner import Conversion, ConvertedLayer, convert

__all__ = ["METHODS", "CalibrationError", "Conversion", "ConvertedLayer", "convert", "layer_errors"]
