"""convert(): a dense or unstructured model becomes N:M, layer by layer, in the order in which its layers run."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch_norm import retune_batch_norm as retune
from tnm_pipeline.training.convert.bias import correct_bias, shift_of
from tnm_pipeline.training.convert.calibration import (
    check_batches,
    collect,
    evaluating,
    execution_order,
    prunable_layer,
)
from tnm_pipeline.training.convert.methods import METHODS, Method
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.layout import PRUNABLE, from_gemm, to_gemm
from tnm_pipeline.training.masks import Solver, count_violations, kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice, Selection, select


@dataclass(frozen=True)
class ConvertedLayer:
    """What happened to one layer. Errors are ||Y' - Y|| / ||Y - dense bias|| on the calibration data.

    Attributes:
        name: in the model.
        type: `Linear` or `Conv2d`.
        shape: of the weight.
        gemm_shape: (O, K) of its GEMM matrix.
        samples: rows of the GEMM that were seen.
        live_inputs: columns that were not zero throughout. Fewer samples or live inputs than K: rank-deficient.
        kept_magnitude: of the old weight by the mask, in [0, 1].
        error_masked: of the masked weight with the old bias.
        error: of the new weight and bias, as stored.
        seconds: for the mask, the weight and the bias; calibration excluded.
        damping: used, relative to the mean diagonal of the gram matrix; 0: none.
        violations: of the pattern in the new weight; always 0.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    gemm_shape: tuple[int, int]
    samples: int
    live_inputs: int
    kept_magnitude: float
    error_masked: float
    error: float
    seconds: float
    damping: float
    violations: int

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` did to a model.

    Attributes:
        layers: in the order of execution, which is the order of conversion.
        masks: layer name -> bool, shape of the weight, `True` = kept.
        choice: the layers chosen, and why the others were not.
        batch_norms: how many were re-tuned.
    """

    layers: list[ConvertedLayer]
    masks: dict[str, Tensor]
    choice: Choice
    batch_norms: int

    @property
    def mean_error(self) -> float:
        """Mean over layers of the error on the calibration data."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, object]:
        """For JSON; masks are left out: they are the non-zeros of the weights."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": dict(self.choice.skipped),
            "mean_error": self.mean_error,
            "batch_norms": self.batch_norms,
        }


@torch.no_grad()
def convert(
    model: nn.Module,
    pattern: Pattern,
    batches: Sequence[Tensor],
    *,
    method: str = "least-squares",
    reference: nn.Module | None = None,
    selection: Selection | None = None,
    solver: Solver = "exact",
    sequential: bool = True,
    retune_batch_norm: bool = True,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Make a model's weights N:M and repair what that breaks, from unlabelled inputs alone.

    For each layer: collect its objective, choose the mask by magnitude, fit the kept weights, set the bias. Each layer
    costs one partial pass over the batches in both models; memory is one copy of the model and one layer's sums,
    K^2 + O K float64. The same inputs give the same bits, on one machine and number of threads.

    Args:
        model: changed in place: weights, biases, running statistics of batch norms. Its modules, modes and gradients
            stay what they are. After an error it is half converted.
        pattern: the rule.
        batches: unlabelled inputs, passed to the model one tensor at a time; read several times.
        method: a name in `METHODS`.
        reference: the model whose layer outputs are the targets; default: `model` as it is now. For an unstructured
            checkpoint, give the dense model it came from if there is one.
        selection: which layers; default: all but the last.
        solver: of the masks.
        sequential: fit each layer to the inputs that the converted layers before it really give, rather than to those
            of the dense model.
        retune_batch_norm: average the running statistics anew over the batches: after every layer if sequential, so
            that the next layer is fitted to what it will get; otherwise once, at the end.
        on_layer: called after each layer with its name, its number from 1 on, and their count.

    Returns:
        The report and the masks.

    Raises:
        CalibrationError: no batches, or NaN in them or in a layer.
        ValueError: an unknown method, nothing to convert, or a reference that has other layers.
    """
    if method not in METHODS:
        raise ValueError(f"unknown conversion method {method!r}: choose one of {', '.join(METHODS)}")
    check_batches(batches)
    choice = select(model, pattern, selection)
    if reference is None:
        reference = copy.deepcopy(model)
    _check_reference(reference, model, choice)
    layers: list[ConvertedLayer] = []
    masks: dict[str, Tensor] = {}
    norms = 0
    with evaluating(model, reference):
        order = execution_order(model, choice.chosen, batches[0])
        choice = _without_idle(choice, order)
        for name, calls in order.items():
            objective = collect(reference, model, name, batches, calls=calls, sequential=sequential)
            layer = prunable_layer(model, name)
            mask, converted = _convert_layer(
                name, layer, prunable_layer(reference, name), objective, pattern, METHODS[method], solver
            )
            masks[name] = mask
            layers.append(converted)
            if retune_batch_norm and (sequential or len(layers) == len(order)):
                norms = retune(model, batches)
            if on_layer is not None:
                on_layer(name, len(layers), len(order))
    return Conversion(layers, masks, choice, norms)


def _convert_layer(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    dense: nn.Linear | nn.Conv2d,
    objective: Objective,
    pattern: Pattern,
    method: Method,
    solver: Solver,
) -> tuple[Tensor, ConvertedLayer]:
    """Convert one layer in place; returns its mask, weight-shaped, and its line of the report."""
    began = time.perf_counter()
    mask = solve(layer.weight, pattern, solver)
    old = to_gemm(layer.weight.detach()).double()
    gemm_mask = to_gemm(mask)
    kept = kept_magnitude(layer.weight, mask)
    error_masked = objective.relative_error(torch.where(gemm_mask, old, 0.0), shift_of(layer, dense))
    solution = method(objective if layer.bias is None else objective.centred(), old, gemm_mask)
    layer.weight.copy_(from_gemm(torch.where(gemm_mask, solution.weight, 0.0), layer.weight.shape))
    correct_bias(layer, dense, objective)
    violations = count_violations(layer.weight, pattern).of(pattern)
    if violations:
        raise AssertionError(f"layer {name} breaks {pattern} in {violations} groups after conversion: a bug")
    return mask, ConvertedLayer(
        name=name,
        type=type(layer).__name__,
        shape=tuple(layer.weight.shape),
        gemm_shape=(old.shape[0], old.shape[1]),
        samples=objective.samples,
        live_inputs=objective.live_inputs,
        kept_magnitude=kept,
        error_masked=error_masked,
        error=objective.relative_error(to_gemm(layer.weight.detach()), shift_of(layer, dense)),
        seconds=time.perf_counter() - began,
        damping=solution.damping,
        violations=violations,
    )


def _check_reference(reference: nn.Module, model: nn.Module, choice: Choice) -> None:
    """Refuse a reference without the chosen layers, before any work is done."""
    theirs = {name: module.weight.shape for name, module in reference.named_modules() if isinstance(module, PRUNABLE)}
    for name in choice.chosen:
        shape = prunable_layer(model, name).weight.shape
        if theirs.get(name) != shape:
            other = f"has shape {tuple(theirs[name])}" if name in theirs else "is absent"
            raise ValueError(
                f"layer {name} has shape {tuple(shape)} in the model and {other} in the reference: "
                "give the dense model of the same architecture"
            )


def _without_idle(choice: Choice, order: dict[str, int]) -> Choice:
    """Move the chosen layers that never run to the skipped ones.

    Raises:
        ValueError: none is left.
    """
    idle = {name: "never called on the first calibration batch" for name in choice.chosen if name not in order}
    if not order:
        raise ValueError(f"none of the chosen layers runs on the calibration data: {', '.join(idle)}")
    return Choice(tuple(name for name in choice.chosen if name in order), choice.skipped | idle)
