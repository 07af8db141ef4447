"""In which precision the calibration passes run: products in bfloat16 where that is faster and hardly changes anything.

What a layer is given is only looked at in sums over many rows, against errors of masks of a tenth of it and more; what
bfloat16 adds is a hundredth at most, and as often up as down. Sums and fits keep their precision.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, head
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.schedule import Schedule
from tnm_pipeline.training.convert.step_dtype import step_dtype

_MOST_NOISE = 0.02  # of the inputs of any layer: its square is little beside that of an error of a tenth
_EXAMPLES = 2


def prefers_bfloat16(model: nn.Module, stops: Mapping[str, Sequence[str]], order: Schedule, example: Batch) -> bool:
    """Whether passes shall run in bfloat16; tried on two examples.

    Only for float32 models on a CPU that multiplies bfloat16, of which no convolution is converted and no batch norm
    re-tuned: means and spreads of outputs are set by differences that rounding would blur.

    Args:
        model: the dense one, in evaluation mode.
        stops: name of a stop -> the modules that belong to it.
        order: of the stops.
        example: a batch that every process has, on which the model runs.
    """
    parameters = [one for one in model.parameters() if one.is_floating_point()]
    if any(one.dtype != torch.float32 or one.device.type != "cpu" for one in parameters):
        return False
    if order.norms or not all(isinstance(prunable_layer(model, stop), nn.Linear) for stop in order.calls):
        return False
    if step_dtype(torch.device("cpu")) != torch.bfloat16:
        return False
    try:
        return _noise(model, stops, order, head(example, _EXAMPLES)) <= _MOST_NOISE
    except Exception:  # code that minds dtypes, such as of index_add_: in float32 the model runs, as the schedule saw
        return False


def _noise(model: nn.Module, stops: Mapping[str, Sequence[str]], order: Schedule, few: Batch) -> float:
    """The largest relative difference of what a layer is given; NaN if one is."""
    exact, rounded = (_inputs(model, stops, order, few, bfloat16=one) for one in (False, True))
    # a layer that is given zeros has no noise
    parts = [(y - x).norm() / x.norm().clamp(min=1e-30) for x, y in zip(exact, rounded, strict=True)]
    return float(torch.stack(parts).max())


def _inputs(
    model: nn.Module, stops: Mapping[str, Sequence[str]], order: Schedule, few: Batch, *, bfloat16: bool
) -> list[Tensor]:
    found: list[Tensor] = []
    with Passes(model, {0: few}, stops, order.calls, {}, bfloat16=bfloat16) as passes:
        for stop in order.calls:
            found += [x.to(torch.float32, copy=True) for x in passes.passes[0].inputs_of(stop)]
            passes.leave(stop)
    return found
