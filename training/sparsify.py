"""One line in anybody's loop: swap layers in place, then ride on the optimizer's hooks."""

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnm_pipeline.training.layers import SparseLayer, make_plain, make_sparse
from tnm_pipeline.training.masks import count_violations, kept_magnitude, solve
from tnm_pipeline.training.masks.solve import Solver
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection, select


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
    masks live in the model (persistent buffers named `mask`) and the counters in `state_dict()`.

    Args:
        model: changed in place; parameters keep their identity and names.
        optimizer: the one that steps the model's parameters.
        pattern: `Pattern` or its text form.
        recipe: `Recipe` or the name of one.
        selection: which layers; default: all but the last.
        total_steps: optimizer steps of the whole training; without it masks never freeze.
        solver: of the masks.

    Raises:
        PatternError: the text form is wrong.
        ValueError: unknown recipe, nothing to make sparse, or NaN weights.
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
        solver: Solver = "exact",
    ) -> None:
        self.model = model
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.choice = select(model, self.pattern, selection)
        self.total_steps = total_steps
        self.solver: Solver = solver
        self.step = 0
        self.flip_rates: list[tuple[int, float]] = []
        masks = {name: self._solve(name) for name in self.choice.chosen}  # all of them, before the model changes
        self._layers: dict[str, SparseLayer] = {
            name: make_sparse(model.get_submodule(name), mask) for name, mask in masks.items()
        }
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            # In eval mode nn.TransformerEncoderLayer reads its layers' weights itself, mask or not, unless one of
            # them has a forward hook.
            *(layer.register_forward_pre_hook(_do_nothing) for layer in self._layers.values()),
        ]

    def _solve(self, name: str) -> Tensor:
        try:
            return solve(self.model.get_submodule(name).get_parameter("weight"), self.pattern, self.solver)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Pull pruned weights to zero, on the gradient: after clipping, before momentum."""
        if self.recipe.decay == 0.0:
            return
        # A loss scaler leaves the unscaling of gradients to a fused optimizer, and hands it the scale like this.
        scale = getattr(optimizer, "grad_scale", None)
        for layer in self._layers.values():
            if layer.weight.grad is not None:
                pull = self.recipe.decay * layer.weight * ~layer.mask
                layer.weight.grad.add_(pull if scale is None else pull * scale)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Likewise it lets a fused optimizer skip a step by itself, and says so like this.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return
        self.step += 1
        if self.recipe.refreshes(self.step, self.total_steps):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> float:
        """Recompute every mask from the weights as they are.

        Returns:
            The flip rate: fraction of mask entries that changed.
        """
        flipped = total = 0
        for name, layer in self._layers.items():
            mask = self._solve(name)
            flipped += int((mask != layer.mask).sum())
            total += mask.numel()
            layer.mask.copy_(mask)
        self.flip_rates.append((self.step, flipped / total))
        return flipped / total

    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask of the weight's shape (not copies)."""
        return {name: layer.mask for name, layer in self._layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters and telemetry, JSON-able. The masks are in the model's own state."""
        return {"step": self.step, "flip_rates": list(self.flip_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = int(state["step"])
        self.flip_rates = [(int(step), float(rate)) for step, rate in state["flip_rates"]]

    def finalize(self) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Write the zeros, verify W and W^T of every layer, and give the plain model back.

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
        kept = {name: kept_magnitude(layer.weight, layer.mask) for name, layer in self._layers.items()}
        masks = {name: make_plain(layer) for name, layer in self._layers.items()}
        self._layers = {}
        return report_layers(self.model, self.pattern, kept, self.choice.skipped), masks


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
