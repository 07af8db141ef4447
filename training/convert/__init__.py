"""Layerwise optimisation: a dense or unstructured checkpoint becomes N:M."""
