"""How well converted layers do on data that they were not fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, attended, check_batches
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.patches import gemm_rows
from tnm_pipeline.training.convert.schedule import schedule
from tnm_pipeline.training.modes import evaluating


@dataclass(frozen=True)
class LayerError:
    """Relative errors ||Y' - Y|| / ||Y - b|| of a layer's output, b being the dense bias.

    Attributes:
        own: Y' is what the layer gives on the dense model's inputs: its own error alone.
        inside: Y' is what it gives inside the converted model, errors of the layers before it included.
    """

    own: float
    inside: float


@torch.no_grad()
def layer_errors(
    reference: nn.Module, model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, LayerError]:
    """Measure layers on the rows themselves, not on sums, one batch at a time.

    Args:
        reference: the dense model.
        model: the converted model.
        names: of layers in both.
        batches: inputs of the models, better other ones than those of the conversion.

    Returns:
        Name -> errors, in the order of execution; layers that do not run on the first batch are absent.

    Raises:
        CalibrationError: empty batches, or NaN in them or in a layer.
    """
    check_batches(batches)
    stops = {name: (name,) for name in names}
    squares: dict[str, list[float]] = {}
    with evaluating(reference, model):
        calls = schedule(reference, stops, batches[0], norms=False).calls
        stops = {name: stops[name] for name in calls}
        for index, batch in enumerate(batches):
            with (
                Passes(reference, {index: batch}, stops, calls, {}) as dense,
                Passes(model, {index: batch}, stops, calls, {}) as sparse,
            ):
                for name in calls:
                    seen = dense.passes[0].inputs_of(name), sparse.passes[0].inputs_of(name)
                    layers = prunable_layer(reference, name), prunable_layer(model, name)
                    found = squares.setdefault(name, [0.0, 0.0, 0.0])
                    squares[name] = [a + b for a, b in zip(found, _squares(*layers, *seen, batch), strict=True)]
                    dense.leave(name)
                    sparse.leave(name)
    return {name: _relative(name, found) for name, found in squares.items()}


def _squares(
    dense: nn.Linear | nn.Conv2d,
    layer: nn.Linear | nn.Conv2d,
    wanted: Sequence[Tensor],
    given: Sequence[Tensor],
    batch: Batch,
) -> list[float]:
    """||Y' - Y||^2 with the dense and with the converted model's inputs, and ||Y - b||^2."""
    real = attended(batch)
    totals = [0.0, 0.0, 0.0]
    for x, sparse_x in zip(wanted, given, strict=True):
        target = dense(x)
        bias = torch.zeros((), device=x.device) if dense.bias is None else dense.bias
        for index, output in enumerate((layer(x) - target, layer(sparse_x) - target, target)):
            for _, rows in gemm_rows(dense, x, output, real):
                assert rows is not None
                totals[index] += float((rows - bias if index == 2 else rows).square().sum(dtype=torch.float64))
    return totals


def _relative(name: str, squares: Sequence[float]) -> LayerError:
    own, inside, target = squares
    if not all(one < float("inf") for one in squares):
        raise CalibrationError(f"layer {name} meets NaN or Inf on the data: the model overflows on it")
    if target == 0:
        return LayerError(float(own > 0), float(inside > 0))
    return LayerError(sqrt(own / target), sqrt(inside / target))


def mean_errors(errors: Mapping[str, LayerError]) -> LayerError:
    """The means over layers."""
    count = len(errors)
    return LayerError(
        sum(one.own for one in errors.values()) / count, sum(one.inside for one in errors.values()) / count
    )
