"""Re-tune the running statistics of batch norms to what a converted model feeds them.

For convolutional networks this is not optional: a masked network's activations shrink, and batch norms with the dense
statistics turn that into noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.calibration import evaluating, to_device_of

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def retune_batch_norm(model: nn.Module, batches: Sequence[Tensor]) -> int:
    """Replace running means and variances by their averages over the batches; weights and modes are left alone.

    Only the batch norms run in training mode, so dropout stays off. The batches count equally, whatever their size.

    Args:
        model: in any mode.
        batches: inputs of the model; each must give a batch norm more than one value per channel.

    Returns:
        How many batch norms were re-tuned; those that do not run, or keep no statistics, stay as they are.
    """
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.track_running_stats]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    old = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.training = True
            for batch in batches:
                model(to_device_of(model, batch))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    ran = [bool(norm.num_batches_tracked) for norm in norms]
    for norm, buffers, has_run in zip(norms, old, ran, strict=True):
        if not has_run:  # on a branch that the data does not reach
            norm.load_state_dict(buffers, strict=False)
    return sum(ran)
