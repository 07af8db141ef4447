"""One line in anybody's loop: swap layers in place, then ride on the optimizer's hooks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnm_pipeline.training.backend import Backend, Packs, check_backend
from tnm_pipeline.training.distributed import (
    check_in_sync,
    full,
    local,
    local_part,
    refuse_flat_parameters,
    refuse_foreign_parts,
    reshard,
)
from tnm_pipeline.training.finalize import LayerReport, check_finite, end_sparse, leak_of, make_all_plain, sparse_layers
from tnm_pipeline.training.kernels.pull import pull
from tnm_pipeline.training.layers import SparseLayer, make_sparse
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection, select
from tnm_pipeline.training.telemetry import Refresh, Stopwatch, compare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OptimizerMismatchError(ValueError):
    """The optimizer steps other parameters than those of the layers that shall become sparse."""


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
        process_group: the processes that train this model together; default: all that there are. That they have the
            same masks is checked in the first step and after every update.
        backend: `masked` multiplies with masked weights, on any device, the same bits each time; `sparse` with packed
            2:4 weights on CUDA where it can; `auto` where that was measured to be faster. See `Packs`.
        micro_batches: forward and backward passes for each optimizer step; only `auto` wants to know.

    Attributes:
        step: optimizer steps done.
        telemetry: one entry per mask update.
        packs: the layers' packed weights; `packs.table()` says how each layer multiplies and why.

    Raises:
        PatternError: the text form is wrong.
        RecipeError: unknown recipe, or one that does not go with the pattern or without `total_steps`.
        OptimizerMismatchError: the optimizer does not hold a chosen weight that learns.
        ShardingError: the weights are cut over processes otherwise than by FSDP2.
        BackendError: unknown backend.
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
        process_group: "ProcessGroup | None" = None,
        backend: Backend = "masked",
        micro_batches: int = 1,
    ) -> None:
        check_backend(backend)
        refuse_flat_parameters(model)
        reshard(model)
        self.model = model
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.recipe.check_pattern(self.pattern)
        self.recipe.check_length(total_steps)
        self.choice = select(model, self.pattern, selection)
        refuse_foreign_parts({name: model.get_submodule(name) for name in self.choice.chosen})
        _check_holds(optimizer, {name: self._weight(name) for name in self.choice.chosen})
        self.total_steps = total_steps
        self.step = 0
        self._process_group = process_group
        self._checked = False  # before the first step: until then DDP may be sending weights and masks around
        self._counting = True
        self.telemetry: list[Refresh] = []
        # all of them, before the model changes
        masks = {name: self._solve(name, full(self._weight(name))) for name in self.choice.chosen}
        leak = self.leak if self.recipe.leaks else None
        soft = self.pattern if self.recipe.soft_threshold else None
        self._layers: dict[str, SparseLayer] = {
            name: make_sparse(
                model.get_submodule(name), mask, leak=leak, soft=soft, sampled=self.recipe.sampled_gradient
            )
            for name, mask in masks.items()
        }
        self.packs = Packs(
            self._layers, self.pattern, backend, micro_batches=micro_batches, never=self.recipe.why_masked
        )
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._since_refresh = self._stopwatch()

    @property
    def leak(self) -> float:
        """What pruned weights count in the next forward pass: 0 is masked, 1 is dense."""
        return self.recipe.leak(self.step, self.total_steps)

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).get_parameter("weight")

    def _solve(self, name: str, weight: Tensor) -> Tensor:
        try:
            return solve(weight, self.pattern, self.recipe.solver)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pull now, or where the gradient is computed inside the step, by a closure, after that."""
        if not self._counting:
            return None
        if not self._checked:
            _check_holds(optimizer, {name: self._weight(name) for name in self._layers})
            check_in_sync(self.step, self.masks(), self._process_group)
            self._checked = True
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
                weight = local(layer.weight) if scale is None else local(layer.weight) * scale
                pull(local(layer.weight.grad), weight, local_part(layer.mask, layer.weight), strength)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Likewise it lets a fused optimizer skip a step by itself, and says so like this.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return
        if not self._counting:
            self.packs.after_step(self.leak)
            return
        before = self.leak
        self.step += 1
        if self.leak != before:
            self._write_leak()
        if self.recipe.refreshes(self.step, self.total_steps):
            self.refresh()
        self.packs.after_step(self.leak)

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
        reshard(self.model)
        watch = self._stopwatch()
        changes = []
        for name, layer in self._layers.items():
            weight = full(layer.weight)
            mask = self._solve(name, weight)
            changes.append(compare(weight, layer.mask, mask))
            layer.mask.copy_(mask)
        check_in_sync(self.step, self.masks(), self._process_group)
        self.telemetry.append(Refresh.of(self.step, changes, watch, self._since_refresh))
        self._since_refresh = self._stopwatch()
        return self.telemetry[-1]

    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(layer.weight.device for layer in self._layers.values())

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
        self._checked = False
        self._since_refresh = self._stopwatch()
        self.packs.after_step(self.leak)

    @contextmanager
    def ignoring_steps(self) -> Iterator[None]:
        """Steps that the optimizer makes in here are none of the training: no pull, no count, no new masks."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def finalize(
        self, copy: nn.Module | None = None, *, strict: bool = True
    ) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Write what layers multiply with into their weights, verify W and W^T, and give plain layers back.

        A recipe that ended dense writes no zeros: its layers count as skipped, without a pattern and without a mask.

        Args:
            copy: finalize this copy of the model instead, such as the `module` of an `AveragedModel`: with the masks
                that the copy has, and before or after the model itself, which goes on as it is.
            strict: refuse to prune weights that still count, and to end a recipe before its dense tail; False: warn.

        Returns:
            A row for every prunable layer, chosen or skipped, and the masks by layer name.

        Raises:
            UnfinishedTrainingError: it is too early; nothing has changed, so training may go on.
            MaskError: a mask breaks the pattern, or the copy has none; nothing has changed.
            RuntimeError: called a second time, or a weight has NaN or Inf; nothing has changed.
            AssertionError: a weight breaks its pattern after its zeros were written (a bug).
        """
        if copy is None and not self._layers:
            raise RuntimeError("finalize() was called before: the model is plain and its zeros are written")
        model = self.model if copy is None else copy
        reshard(model)
        layers = sparse_layers(model, self.choice.chosen)
        check_finite(layers)
        dense = None
        if self.recipe.ends_dense and leak_of(layers) == 1.0:
            dense = f"recipe {self.recipe.name} ends dense"
        else:
            when = f"after step {self.step} of {self.total_steps}"
            end_sparse(layers, self.pattern, self.recipe, when, strict=strict)
        if copy is None:
            for hook in self._hooks:
                hook.remove()
            self.packs.remove()
            self._layers = {}
        return make_all_plain(model, layers, self.pattern, self.choice.skipped, dense)


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
            "layers): it was made for other parameters, or before something (fully_shard) replaced them. Make it from "
            "this model's parameters, freeze these layers (requires_grad_(False)), or exclude them: "
            "Selection(exclude=...)"
        )
