"""Forward passes that collect one layer's objective, in the dense and in the partly converted model.

Nothing but the sums of one layer stays in memory: every layer costs its own passes over the calibration data, each
ended as soon as the layer has run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.patches import gemm_rows


class CalibrationError(ValueError):
    """Calibration data that no layer can be fitted to, such as none at all or NaN."""


class _StopForward(Exception):
    pass


def check_batches(batches: Sequence[Tensor]) -> None:
    """Refuse calibration data before any work is done.

    Args:
        batches: inputs of the model, first axis = examples.

    Raises:
        CalibrationError: no batch, an empty batch, or NaN or Inf; the message names the batch.
    """
    if len(batches) == 0:
        raise CalibrationError("there are no calibration batches: give at least one tensor of model inputs")
    for index, batch in enumerate(batches):
        if batch.numel() == 0:
            raise CalibrationError(f"calibration batch {index} is empty, shape {tuple(batch.shape)}: leave it out")
        bad = int((~torch.isfinite(batch)).sum())
        if bad:
            raise CalibrationError(
                f"calibration batch {index} has {bad} NaN or Inf of {batch.numel()} values: "
                "clean the data or leave it out"
            )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def execution_order(model: nn.Module, names: Sequence[str], batch: Tensor) -> dict[str, int]:
    """How often each layer runs in one forward pass, in the order in which they first do.

    Args:
        model: in evaluation mode.
        names: of layers.
        batch: one input.

    Returns:
        Name -> calls, at least 1. A layer that is never called as a module is absent.
    """
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    handles = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name)) for name in names]
    try:
        model(to_device_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def collect(
    reference: nn.Module,
    model: nn.Module,
    name: str,
    batches: Sequence[Tensor],
    *,
    calls: int = 1,
    sequential: bool = True,
) -> Objective:
    """Sum up the objective of one layer over all batches.

    Args:
        reference: the dense model, in evaluation mode: it sets the targets.
        model: the partly converted model, in evaluation mode.
        name: of a Linear or Conv2d in both.
        batches: inputs of the models.
        calls: how often the layer runs in one forward pass; later calls are not looked at.
        sequential: inputs of the layer from `model`, those it will really get; otherwise from `reference`.

    Raises:
        CalibrationError: the layer meets NaN or Inf, never runs, or runs differently in the two models.
    """
    dense = prunable_layer(reference, name)
    total: Objective | None = None
    for batch in batches:
        wanted = _record(reference, dense, batch, calls)
        given = _record(model, prunable_layer(model, name), batch, calls) if sequential else wanted
        if [x.shape for x, _ in wanted] != [x.shape for x, _ in given]:
            raise CalibrationError(
                f"layer {name} runs {len(wanted)} times in the dense model and {len(given)} times in the converted "
                "one, or on other shapes: its execution depends on the data; leave it out, or use sequential=False"
            )
        for (_, output), (inputs, _) in zip(wanted, given, strict=True):
            for x, y in gemm_rows(dense, inputs, output):
                part = Objective.of(x, y if dense.bias is None else y - dense.bias.double())
                total = part if total is None else total + part
    if total is None:
        raise CalibrationError(f"layer {name} does not run on the calibration data: leave it out")
    if not total.is_finite():
        raise CalibrationError(
            f"layer {name} meets NaN or Inf on the calibration data: the model overflows on it or "
            "its weights are broken"
        )
    return total


def _record(model: nn.Module, layer: nn.Module, batch: Tensor, calls: int) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the first `calls` calls of a layer in one forward pass."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        inputs = args[0] if args else kwargs["input"]
        seen.append((inputs.clone(), output.clone()))  # an in-place activation may follow
        if len(seen) == calls:
            raise _StopForward

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        model(to_device_of(model, batch))
    except _StopForward:
        pass
    finally:
        handle.remove()
    return seen


def prunable_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of that name.

    Raises:
        TypeError: it is neither Linear nor Conv2d.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"{name} is a {type(layer).__name__}: only Linear and Conv2d layers are converted")
    return layer


def to_device_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The batch on the device of the model's first parameter."""
    return batch.to(next(model.parameters()).device)
