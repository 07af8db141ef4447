"""From abs(W) to a mask: solvers, checks and theory."""

from tnm_pipeline.training.masks.check import Violations, count_violations, kept_magnitude
from tnm_pipeline.training.masks.keep import keep
from tnm_pipeline.training.masks.solve import Solver, solve

__all__ = ["Solver", "Violations", "count_violations", "keep", "kept_magnitude", "solve"]
