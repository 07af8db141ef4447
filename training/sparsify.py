"""One line in anybody's loop: swap layers in place, then ride on the optimizer's hooks."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnm_pipeline.training.layers import SparseLayer, make_plain, make_sparse, used_weight
from tnm_pipeline.training.masks import count_violations, kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection, select
from tnm_pipeline.training.telemetry import Refresh, Stopwatch, compare


class OptimizerMismatchError(ValueError):
    """The optimizer steps other parameters than those of the layers that shall become sparse."""


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


class Sparsifier:
    """Makes a model train with N:M masks.

    ```python
    sparsifier = Sparsifier(model, optimizer, "2:4-T")
    ...                       # the loop stays as it is
    report = sparsifier.finalize()
    ```

    Steps are optimizer steps: gradient accumulation and steps skipped by a loss scaler do not count. The
    masks live in the model (persistent buffers named `mask`, and whatever else `buffers()` names) and the counters in
    `state_dict()`.

    A chosen layer whose weight is frozen (`requires_grad` is False) gets a mask too, which stays as its weights do.

    Args:
        model: changed in place; parameters keep their identity and names.
        optimizer: the one that steps the model's parameters; it may have been made before.
        pattern: `Pattern` or its text form.
        recipe: `Recipe` or the name of one.
        selection: which layers; default: all but the last.
        total_steps: optimizer steps of the whole training; without it masks never freeze, and a recipe that leaks
            refuses to begin.

    Attributes:
        step: optimizer steps done.
        telemetry: one entry per mask update.

    Raises:
        PatternError: the text form is wrong.
        RecipeError: unknown recipe, or one that does not go with the pattern or without `total_steps`.
        OptimizerMismatchError: the optimizer does not hold a chosen weight that learns.
        ValueError: nothing to make sparse, or NaN weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        pattern: Pattern | str,
        recipe: Recipe | str = "dynamic",
        *,
        selection: Selection | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.model = model
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.recipe.check_pattern(self.pattern)
        self.recipe.check_length(total_steps)
        self.choice = select(model, self.pattern, selection)
        _check_holds(optimizer, {name: self._weight(name) for name in self.choice.chosen})
        self.total_steps = total_steps
        self.step = 0
        self.telemetry: list[Refresh] = []
        masks = {name: self._solve(name) for name in self.choice.chosen}  # all of them, before the model changes
        leak = self.leak if self.recipe.leaks else None
        soft = self.pattern if self.recipe.soft_threshold else None
        self._layers: dict[str, SparseLayer] = {
            name: make_sparse(model.get_submodule(name), mask, leak=leak, soft=soft) for name, mask in masks.items()
        }
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            # In eval mode nn.TransformerEncoderLayer reads its layers' weights itself, mask or not, unless one of
            # them has a forward hook.
            *(layer.register_forward_pre_hook(_do_nothing) for layer in self._layers.values()),
        ]

    @property
    def leak(self) -> float:
        """What pruned weights count in the next forward pass: 0 is masked, 1 is dense."""
        return self.recipe.leak(self.step, self.total_steps)

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).get_parameter("weight")

    def _solve(self, name: str) -> Tensor:
        try:
            return solve(self._weight(name), self.pattern, self.recipe.solver)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pull now, or where the gradient is computed inside the step, by a closure, after that."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull(optimizer)
            return None

        def pulled() -> Any:
            loss = closure()
            self._pull(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": pulled}

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer) -> None:
        """Pull pruned weights to zero, on the gradient: after clipping, before momentum."""
        strength = self.recipe.decay * (1.0 - self.leak)
        if strength == 0.0:
            return
        # A loss scaler leaves the unscaling of gradients to a fused optimizer, and hands it the scale like this.
        scale = getattr(optimizer, "grad_scale", None)
        for layer in self._layers.values():
            if layer.weight.grad is not None:
                pull = strength * layer.weight * ~layer.mask
                layer.weight.grad.add_(pull if scale is None else pull * scale)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Likewise it lets a fused optimizer skip a step by itself, and says so like this.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return
        before = self.leak
        self.step += 1
        if self.leak != before:
            self._write_leak()
        if self.recipe.refreshes(self.step, self.total_steps):
            self.refresh()

    def _write_leak(self) -> None:
        for layer in self._layers.values():
            if layer.leak is not None:
                layer.leak.fill_(self.leak)

    @torch.no_grad()
    def refresh(self) -> Refresh:
        """Recompute every mask from the weights as they are.

        Returns:
            What changed, which `telemetry` keeps.
        """
        watch = Stopwatch(layer.weight.device for layer in self._layers.values())
        changes = []
        for name, layer in self._layers.items():
            mask = self._solve(name)
            changes.append(compare(layer.weight, layer.mask, mask))
            layer.mask.copy_(mask)
        self.telemetry.append(Refresh.of(self.step, changes, watch))
        return self.telemetry[-1]

    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask of the weight's shape (not copies), as of the last update."""
        return {name: layer.mask for name, layer in self._layers.items()}

    def buffers(self) -> dict[str, Tensor]:
        """All that the Sparsifier added to the model's `state_dict`, by its name there (not copies)."""
        return {
            f"{name}.{buffer}".removeprefix("."): tensor
            for name, layer in self._layers.items()
            for buffer, tensor in layer.named_buffers(recurse=False)
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters and telemetry, JSON-able. Masks and other buffers are in the model's own state."""
        return {"step": self.step, "telemetry": [asdict(refresh) for refresh in self.telemetry]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = int(state["step"])
        self.telemetry = [Refresh(**refresh) for refresh in state["telemetry"]]
        self._write_leak()

    def finalize(self) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Write what layers multiply with into their weights, verify W and W^T, and give the plain model back.

        A recipe that ended dense writes no zeros: its layers count as skipped, without a pattern and without a mask.

        Returns:
            A row for every prunable layer, chosen or skipped, and the masks by layer name.

        Raises:
            RuntimeError: called a second time.
            AssertionError: a weight breaks its pattern after its zeros were written (a bug).
        """
        if not self._layers:
            raise RuntimeError("finalize() was called before: the model is plain and its zeros are written")
        for hook in self._hooks:
            hook.remove()
        layers, self._layers = self._layers, {}
        dense = {}
        if self.recipe.ends_dense and _leak_of(layers) == 1.0:
            dense = dict.fromkeys(layers, f"recipe {self.recipe.name} ends dense")
        else:
            self._close_the_leak(layers)
        kept = {name: kept_magnitude(layer.weight, used_weight(layer) != 0) for name, layer in layers.items()}
        masks = {name: make_plain(layer) for name, layer in layers.items()}
        if dense:
            kept, masks = {}, {}
        return report_layers(self.model, self.pattern, kept, self.choice.skipped | dense), masks

    def _close_the_leak(self, layers: Mapping[str, SparseLayer]) -> None:
        leak = _leak_of(layers)  # of the weights that are there, which may be those of an earlier step
        if leak > 0:
            warnings.warn(
                f"finalize() after step {self.step} of {self.total_steps}, while pruned weights still count "
                f"{leak:.0%}: they become zero now, which changes what the model computes; train on, or give the "
                "total_steps that are really taken, or keep the weights of the end rather than earlier ones",
                stacklevel=3,
            )
        if self.recipe.ends_dense:
            warnings.warn(
                f"finalize() before the dense tail of recipe {self.recipe.name}: the model stays sparse",
                stacklevel=3,
            )
        for layer in layers.values():
            if layer.leak is not None:
                layer.leak.zero_()


def _leak_of(layers: Mapping[str, SparseLayer]) -> float:
    return max((float(layer.leak) for layer in layers.values() if layer.leak is not None), default=0.0)


def _check_holds(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that does not step a weight that learns.

    Raises:
        OptimizerMismatchError: names the layers.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in held]
    if missing:
        raise OptimizerMismatchError(
            f"the optimizer does not hold the weights of {', '.join(missing)} ({len(missing)} of {len(weights)} chosen "
            "layers): it was made for other parameters, or before something replaced them. Make it from this model's "
            "parameters, freeze these layers (requires_grad_(False)), or exclude them: Selection(exclude=...)"
        )


def _do_nothing(*_: Any) -> None:
    """A forward hook that is only there to be seen."""


def report_layers(
    model: nn.Module, pattern: Pattern, kept: dict[str, float], skipped: dict[str, str]
) -> list[LayerReport]:
    """One row per prunable layer of a plain model whose zeros are written.

    Args:
        model: plain.
        pattern: that the layers named in `kept` must hold.
        kept: layer name -> kept magnitude.
        skipped: layer name -> reason.

    Raises:
        AssertionError: a weight breaks the pattern; names the layer.
    """
    rows = []
    for name, layer in model.named_modules():
        if name not in kept and name not in skipped:
            continue
        weight = cast(Tensor, layer.weight).detach()
        violations = count_violations(weight, pattern) if name in kept else None
        assert violations is None or violations.of(pattern) == 0, f"{name} breaks {pattern}: {violations}"
        rows.append(
            LayerReport(
                name=name,
                type=type(layer).__name__,
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
