"""How well converted layers do on data that they were not fitted to."""

from collections.abc import Sequence

from torch import Tensor, nn

from tnm_pipeline.training.convert.bias import shift_of
from tnm_pipeline.training.convert.calibration import (
    check_batches,
    collect,
    evaluating,
    execution_order,
    prunable_layer,
)
from tnm_pipeline.training.layout import to_gemm


def layer_errors(
    reference: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    *,
    sequential: bool = True,
) -> dict[str, float]:
    """Relative error ||Y' - Y|| / ||Y - b|| of each layer's output, b being the dense bias.

    Args:
        reference: the dense model.
        model: the converted model.
        names: of layers in both.
        batches: inputs of the models, better other ones than those of the conversion.
        sequential: Y' is what the layer gives inside the converted model, errors of the layers before it included;
            otherwise what it gives on the dense model's inputs: its own error alone.

    Returns:
        Name -> error, in the order of execution; layers that do not run on the first batch are absent.

    Raises:
        CalibrationError: empty batches, or NaN in them or in a layer.
    """
    check_batches(batches)
    errors: dict[str, float] = {}
    with evaluating(reference, model):
        for name, calls in execution_order(reference, names, batches[0]).items():
            objective = collect(reference, model, name, batches, calls=calls, sequential=sequential)
            layer = prunable_layer(model, name)
            shift = shift_of(layer, prunable_layer(reference, name))
            errors[name] = objective.relative_error(to_gemm(layer.weight.detach()), shift)
    return errors
