"""Whether a model fits its data, and how well it does on a test set."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.sources import SourceError, Splits
from tnm_pipeline.training.tasks import Classification, Task, TaskError


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TensorDataset, batch_size: int | None = None, *, task: Task | None = None
) -> float:
    """Score a model in eval mode; the mode is put back afterwards.

    Args:
        model: on any device.
        data: inputs and, last, targets.
        batch_size: samples per forward pass; default: what the task says.
        task: whose metric; default: classification, whose metric is the top-1 accuracy in [0, 1].

    Raises:
        TaskError: the model returns something else than the task needs.
    """
    task = task or Classification()
    size = batch_size or task.at_once
    device = next(model.parameters()).device
    predictions, targets = [], []
    with evaluating(model):
        for start in range(0, len(data), size):
            *inputs, target = data[start : start + size]
            predictions.append(task.predict(model, [tensor.to(device) for tensor in inputs]).cpu())
            targets.append(target)
    return task.score(torch.cat(predictions), torch.cat(targets))


def check_match(model: nn.Module, data: Splits) -> None:
    """Refuse data that the model cannot take, before any time is spent.

    Raises:
        SourceError: the model has no parameters, raises, or returns what does not fit the task.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise SourceError("the model has no parameters: there is nothing to train or to make sparse")
    *inputs, _ = data.train[:2]
    try:
        with torch.no_grad(), evaluating(model):
            predictions = data.task.predict(model, [tensor.to(parameter.device) for tensor in inputs])
        data.task.check(predictions, torch.cat([split.tensors[-1] for split in (data.train, data.test)]))
    except TaskError as error:
        raise SourceError(str(error)) from error
    except Exception as error:  # forward() is the user's own code, which may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise SourceError(
            f"the model does not take the data's inputs of shape {shapes}: {type(error).__name__}: {error}"
        ) from error


def unused_parameters(model: nn.Module, data: Splits) -> list[nn.Parameter]:
    """Parameters that play no part in the predictions although they learn, such as those of an encoder's pooler.

    Args:
        model: one that `check_match` let through; in any mode, which is put back.
        data: of which two samples are tried.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    *inputs, _ = data.train[:2]
    with evaluating(model):
        predictions = data.task.predict(model, [tensor.to(learning[0].device) for tensor in inputs])
    gradients = torch.autograd.grad(predictions.sum(), learning, allow_unused=True)
    return [parameter for parameter, gradient in zip(learning, gradients, strict=True) if gradient is None]
