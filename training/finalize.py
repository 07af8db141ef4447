"""The end of a training with masks: every layer's zeros written and verified, plain layers again, and a report."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import cast

from torch import Tensor, nn

from tnm_pipeline.training.distributed import full, plain_type
from tnm_pipeline.training.layers import SparseConv2d, SparseLayer, SparseLinear, make_plain, used_weight
from tnm_pipeline.training.masks import count_violations, kept_magnitude
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe

_SYNC = "for name, tensor in sparsifier.buffers().items(): copy.get_buffer(name).copy_(tensor)"


class UnfinishedTrainingError(RuntimeError):
    """Masks do not hold fully yet, or the dense tail of a recipe has not come: zeros would change the model."""


class MaskError(ValueError):
    """A model holds no masks, or masks that break the pattern."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one prunable layer.

    Attributes:
        name: dotted module name.
        type: `Linear` or `Conv2d`.
        shape: of the weight.
        pattern: text form; None when the layer stayed dense.
        skipped: why it stayed dense; None otherwise.
        kept_magnitude: sum of kept abs(w) over sum of abs(w), before the zeros were written; None when dense.
        sparsity: fraction of weights that are zero.
        violations: groups of W with more than N non-zeros; None when dense.
        violations_transposed: groups of W^T with more than N non-zeros; None when dense or not transposable.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    pattern: str | None
    skipped: str | None
    kept_magnitude: float | None
    sparsity: float
    violations: int | None
    violations_transposed: int | None

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-able values."""
        return asdict(self)


def sparse_layers(model: nn.Module, names: Iterable[str]) -> dict[str, SparseLayer]:
    """The layers that masks were given to, by name.

    Raises:
        MaskError: one of them is not there, or plain.
    """
    modules = dict(model.named_modules())
    layers = {name: modules.get(name) for name in names}
    plain = [name for name, layer in layers.items() if not isinstance(layer, SparseLinear | SparseConv2d)]
    if plain:
        raise MaskError(
            f"no sparse layer of the name {plain[0]!r} in the {type(model).__name__} to finalize ({len(plain)} of "
            f"{len(layers)} are missing): pass a copy of the model that was made while it trained with masks; of an "
            "AveragedModel its .module"
        )
    return cast(dict[str, SparseLayer], layers)


def leak_of(layers: Mapping[str, SparseLayer]) -> float:
    """What pruned weights count in these layers, whose weights may be those of an earlier step."""
    return max((float(layer.leak) for layer in layers.values() if layer.leak is not None), default=0.0)


def end_sparse(layers: Mapping[str, SparseLayer], pattern: Pattern, recipe: Recipe, when: str, *, strict: bool) -> None:
    """Make sure that what layers multiply with holds the pattern, or leave them as they are.

    Args:
        layers: whose leak is set to 0.
        pattern: of all of them.
        recipe: that they were trained with.
        when: the step, for messages.
        strict: refuse what is too early; otherwise warn.

    Raises:
        UnfinishedTrainingError: it is too early.
        MaskError: a mask breaks the pattern.
    """
    for name, layer in layers.items():
        broken = count_violations(layer.mask, pattern).of(pattern)
        if broken:
            raise MaskError(
                f"the mask of {name} breaks {pattern} in {broken} groups. Averaged with the weights? Average "
                f"parameters only, as AveragedModel(use_buffers=False) does, or restore the masks first: {_SYNC}"
            )
    unfinished = _unfinished(leak_of(layers), recipe, when)
    if unfinished and strict:
        raise UnfinishedTrainingError(f"{unfinished}; finalize(strict=False) writes them nevertheless")
    if unfinished:
        warnings.warn(unfinished, stacklevel=3)
    for layer in layers.values():
        if layer.leak is not None:
            layer.leak.zero_()


def _unfinished(leak: float, recipe: Recipe, when: str) -> str | None:
    """Why it is too early to write zeros, if it is."""
    if leak > 0:
        return (
            f"{when} pruned weights still count {leak:.3g} of their value: zeros in their place change what the model "
            "computes; train on, or give the total_steps that are really taken, or keep the weights of the end rather "
            "than earlier ones"
        )
    if recipe.ends_dense:
        return (
            f"{when} the weights are not those of the dense tail of recipe {recipe.name}: with zeros the model stays "
            "sparse; train on"
        )
    return None


def check_finite(layers: Mapping[str, SparseLayer]) -> None:
    """Refuse weights of a training that has diverged.

    Raises:
        RuntimeError: a weight has NaN or Inf; names the layer.
    """
    for name, layer in layers.items():
        if not bool(full(layer.weight).isfinite().all()):
            raise RuntimeError(
                f"the weight of layer {name} has NaN or Inf, so the training has diverged: go back to a checkpoint "
                "before that, and take a smaller learning rate"
            )


def make_all_plain(
    model: nn.Module, layers: Mapping[str, SparseLayer], pattern: Pattern, skipped: dict[str, str], dense: str | None
) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """Write what layers multiply with into their weights, turn them back into plain ones, and verify them.

    Args:
        model: of the layers.
        layers: by name.
        pattern: of all of them.
        skipped: name of any other prunable layer -> reason.
        dense: why the layers hold no pattern now; None: they do.

    Returns:
        A row for every prunable layer, and the masks by layer name; no masks where the layers are dense.

    Raises:
        AssertionError: a weight breaks the pattern; names the layer.
    """
    kept = {name: _kept(layer) for name, layer in layers.items()}
    masks = {name: make_plain(layer) for name, layer in layers.items()}
    if dense:
        return _report(model, pattern, {}, skipped | dict.fromkeys(layers, dense)), {}
    return _report(model, pattern, kept, skipped), masks


def _kept(layer: SparseLayer) -> float:
    weight = full(layer.weight)
    return kept_magnitude(weight, used_weight(layer, weight) != 0)


def _report(model: nn.Module, pattern: Pattern, kept: dict[str, float], skipped: dict[str, str]) -> list[LayerReport]:
    rows = []
    for name, layer in model.named_modules():
        if name not in kept and name not in skipped:
            continue
        weight = full(cast(Tensor, layer.weight))
        violations = count_violations(weight, pattern) if name in kept else None
        assert violations is None or violations.of(pattern) == 0, f"{name} breaks {pattern}: {violations}"
        rows.append(
            LayerReport(
                name=name,
                type=plain_type(layer).__name__,
                shape=tuple(weight.shape),
                pattern=str(pattern) if violations else None,
                skipped=skipped.get(name),
                kept_magnitude=kept.get(name),
                sparsity=float((weight == 0).double().mean()),
                violations=violations.forward if violations else None,
                violations_transposed=violations.transposed if violations and pattern.transposable else None,
            )
        )
    return rows
