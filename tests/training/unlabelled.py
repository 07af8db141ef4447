"""Calibration batches as tests read them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnm_pipeline.training.convert.batch import Batch
from tnm_pipeline.training.unlabelled import load_calibration


def loaded(
    source: str | Path, arguments: dict[str, Any] | None = None, samples: int = 100, batch_size: int = 4, seed: int = 0
) -> list[Batch]:
    """The batches of a source, few and small."""
    return load_calibration(str(source), arguments or {}, samples=samples, batch_size=batch_size, seed=seed)


def joined(batches: list[Batch]) -> Tensor:
    """All examples of batches that are single tensors."""
    tensors = [batch for batch in batches if isinstance(batch, Tensor)]
    assert len(tensors) == len(batches)
    return torch.cat(tensors)


def named(batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Batches of tensors by name, for the type checker too."""
    assert all(isinstance(batch, dict) for batch in batches)
    return [dict(batch) for batch in batches if isinstance(batch, dict)]


def permutation(count: int, seed: int = 0) -> Tensor:
    """The order in which a source's examples are drawn."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
