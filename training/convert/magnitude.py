"""Magnitude: keep the largest weights and change nothing else, the baseline of every other method."""

import torch

from tnm_pipeline.training.convert.problem import Problem, Solution


def magnitude(problem: Problem) -> Solution:
    """Mask the weights; the objective is not read."""
    mask = problem.project(problem.weight)
    return Solution(torch.where(mask, problem.weight, 0.0), mask)
