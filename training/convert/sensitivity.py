"""How much each layer matters to what the network returns, from unlabelled inputs and one backward pass each.

Errors e_s of a layer's output, at the positions s of an example, change the network's output by J e, J its Jacobian
there. With random signs v, E_v (v . J e)^2 = ||J e||^2, and v^T J is, for all layers at once, the gradient g of one
backward pass that starts from v. Hence

    ||J e||^2  =  E_v (sum_s g_s . e_s)^2  ~  sum_o (sum_s g_so^2) (mean_s e_so^2) * coherence

The last form needs nothing of the error but its mean square per output channel, which a layer's objective knows for any
new weight. With coherence 1 it holds if errors of different positions and channels are independent. They are not:
those of a convolution repeat over the image and add up. How much they do is measured, on the error that masking the
layer by magnitude makes, and taken to be the same for the other errors of the layer. Effects of several layers add up,
less what the layers that are converted later repair.

What a conversion repairs must not count: a bias takes up the mean error of its channel, and a batch norm that is
re-tuned also the part of the error that only stretches the channel. Otherwise layers before batch norms look far worse
than they are.

Shape legend: B = examples, T = positions of a sequence, O = out features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, attended, check_batches, forward, tensors_of
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.convert.meter import Meter, Repair, real_entries
from tnm_pipeline.training.convert.schedule import schedule
from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice

ENOUGH = 128  # random vectors, examples times probes: the noise of an effect is then about an eighth
# Of an error's effect, what each layer that is converted later takes away: it is fitted to inputs that have the error.
# With this share the effects of a CNN's 32 layers add up to what converting them all does; docs/log.md.
ABSORBED = 0.06


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of the network's output to one layer.

    Attributes:
        per_output: (O,) float64, the relative squared change of the network's output for a mean squared error of 1 in
            each output channel, if its errors at different positions were independent.
        coherence: by how much they add up instead; 1: not at all.
        repair: what is mended afterwards; the errors given to `effect` are those that remain.
        remaining: the share of the effect that is left once later layers are converted as well.
    """

    per_output: Tensor
    coherence: float
    repair: Repair
    remaining: float = 1.0

    def effect(self, squared_error: Tensor) -> float:
        """The relative squared change ||f' - f||^2 / ||f||^2 of the network's output, predicted to first order.

        Args:
            squared_error: (O,), mean over rows of the squared error of each output, after the repair.
        """
        return self.remaining * self.coherence * float(self.per_output @ squared_error.to(self.per_output))


def measure_sensitivity(
    model: nn.Module,
    choice: Choice,
    pattern: Pattern,
    batches: Sequence[Batch],
    *,
    probes: int | None = None,
    seed: int = 0,
    retuned: bool = True,
) -> dict[str, Sensitivity]:
    """Measure all layers at once.

    Memory holds one batch with its graph, twice the outputs of the layers among it, and of
    each layer up to 2 O float32 numbers for every example and probe. The output is every floating-point
    tensor that the model returns, as one vector; what `attention_mask` leaves out counts neither there nor in the
    layers. The same arguments give the same bits on one machine and number of threads.

    Args:
        model: the dense model; comes back as it was.
        choice: the layers; those that share a weight are measured together.
        pattern: whose magnitude mask makes the error that the coherence is measured on.
        batches: unlabelled inputs; about 128 examples are enough, and fewer get more probes.
        probes: backward passes per batch, each with new random signs; default: 128 over the
            number of examples, rounded, at least 1.
        seed: of the signs.
        retuned: batch norms will be re-tuned after the conversion.

    Returns:
        Name -> sensitivity, for the chosen layers that run.

    Raises:
        CalibrationError: no batches, NaN or Inf, or outputs that no chosen layer reaches by differentiable steps.
    """
    check_batches(batches)
    if probes is None:
        probes = max(1, round(ENOUGH / sum(_examples(batch) for batch in batches)))
    generator = torch.Generator().manual_seed(seed)
    groups = {name: (name, *choice.tied.get(name, ())) for name in choice.chosen}
    with evaluating(model), _frozen(model):
        normed = schedule(model, groups, batches[0], norms=retuned).normed
        meters, handles = {}, []
        for chosen, group in groups.items():
            for name in group:
                layer = prunable_layer(model, name)
                meters[name] = Meter(layer, pattern, before_batch_norm=chosen in normed)
                handles.append(layer.register_forward_hook(meters[name].watch, with_kwargs=True))
        try:
            square = sum(_probe(model, batch, meters, probes, generator) for batch in batches)
        finally:
            for handle in handles:
                handle.remove()
    if not 0 < square < float("inf"):
        raise CalibrationError(
            f"the squares of the model's outputs add up to {square} on the calibration data, so no change can be "
            "relative to them: check the batches and the weights"
        )
    measured = {name: _join(name, [meters[one] for one in group], square * probes) for name, group in groups.items()}
    return {name: sensitivity for name, sensitivity in measured.items() if sensitivity is not None}


def after_later_layers(measured: Mapping[str, Sensitivity], order: Sequence[str]) -> dict[str, Sensitivity]:
    """Sensitivities in a model of which all chosen layers are converted, one after the other.

    Args:
        measured: by `measure_sensitivity`, one layer at a time.
        order: of execution.

    Raises:
        CalibrationError: a layer has no sensitivity.
    """
    missing = [name for name in order if name not in measured]
    if missing:
        raise CalibrationError(
            f"layer {missing[0]} does not run on the examples of calibration that sensitivities are measured on: leave "
            "it out, or give it data"
        )
    last = len(order) - 1
    return {name: replace(measured[name], remaining=(1 - ABSORBED) ** (last - at)) for at, name in enumerate(order)}


def _probe(
    model: nn.Module, batch: Batch, meters: Mapping[str, Meter], probes: int, generator: torch.Generator
) -> float:
    """One forward pass and its backward passes; returns the sum of squares of the outputs."""
    real = attended(batch)
    for meter in meters.values():
        meter.real, meter.examples = real, _examples(batch)
    with torch.enable_grad():
        outputs = [tensor for tensor in _floating(forward(model, batch)) if tensor.requires_grad]
    if not outputs:
        raise CalibrationError(
            "none of the floating-point outputs of the model depends on a chosen layer by differentiable steps, so the "
            "effect of a layer cannot be measured: give a model that returns logits or features"
        )
    weights = [real_entries(output, real) for output in outputs]
    for probe in range(probes):
        signs = [
            torch.randint(0, 2, output.shape, generator=generator).to(output).mul_(2).sub_(1).mul_(weight)
            for output, weight in zip(outputs, weights, strict=True)
        ]
        torch.autograd.backward(outputs, signs, retain_graph=probe < probes - 1)
    return sum(float((o.detach().double() * w).square().sum()) for o, w in zip(outputs, weights, strict=True))


def _join(name: str, meters: Sequence[Meter], square: float) -> Sensitivity | None:
    """The sensitivity to a weight that some layers, usually one, share; `None` when none of them ran."""
    rows = sum(meter.rows for meter in meters)
    if rows == 0:
        return None
    per_output = torch.stack([meter.per_output for meter in meters]).sum(0) / square
    remaining = [meter.remaining() for meter in meters]
    squared_error = torch.stack([squares for squares, _ in remaining]).sum(0) / rows
    response = sum(response for _, response in remaining) / square
    independent = float(per_output @ squared_error)
    if not independent < float("inf"):
        raise CalibrationError(
            f"layer {name} meets NaN or Inf on the calibration data or in the gradients: the model overflows on it or "
            "its weights are broken"
        )
    return Sensitivity(per_output, response / independent if independent else 1.0, meters[0].repair)


def _floating(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in whatever a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _floating(item)


def _examples(batch: Batch) -> int:
    return len(next(tensors_of(batch))[1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: backward passes cost half and leave nothing behind."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
