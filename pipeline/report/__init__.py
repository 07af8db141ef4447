"""The self-contained HTML report of a run."""

from tnm_pipeline.pipeline.report.page import render

__all__ = ["render"]
