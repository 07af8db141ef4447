"""From a model and calibration data to a plan, whatever the way of choosing.

Where errors are predicted, the dense model runs once over all batches and stops before each layer, as in a conversion,
so memory holds one layer's sums.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn

from tnm_pipeline.training.convert.batch import Batch, attended, check_batches, head
from tnm_pipeline.training.convert.budget import Budget
from tnm_pipeline.training.convert.calibration import model_errors, one_thread, prunable_layer
from tnm_pipeline.training.convert.choosing import (
    Scene,
    plan_by_error,
    plan_by_preference,
    plan_by_zeros,
    plan_under_budget,
)
from tnm_pipeline.training.convert.collect import Collector, Seen
from tnm_pipeline.training.convert.damping import TRIED
from tnm_pipeline.training.convert.estimate import Estimate, estimate_fitted
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.meter import Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.plan import Plan, PlanError, draft
from tnm_pipeline.training.convert.schedule import schedule
from tnm_pipeline.training.convert.sensitivity import after_later_layers, measure_sensitivity
from tnm_pipeline.training.convert.work import measure_work
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import FOR_CONVERSION, Selection, select
from tnm_pipeline.training.unlabelled import count_examples

Choose = Literal["pattern", "zeros", "error", "budget"]
"""The first pattern that fits; by the zeros there are; by the predicted error; under a budget, by sensitivity."""

_PROBED = 64  # examples of a sensitivity: with two probes each, as many as are enough
_TESTED = 4  # every so-manieth batch tests predictions


@torch.no_grad()
def plan(
    model: nn.Module,
    batches: Sequence[Batch],
    patterns: Sequence[Pattern],
    *,
    selection: Selection | None = None,
    choose: Choose = "pattern",
    confidence: float = 0.95,
    most_error: float | None = None,
    budget: Budget | None = None,
    reference: nn.Module | None = None,
    retune_batch_norm: bool = True,
    workers: int = 1,
    seed: int = 0,
) -> Plan:
    """Decide which layer gets which pattern.

    `pattern` and `zeros` run two examples; `error` also runs all batches once, and `budget` measures sensitivities on
    some of them besides. The same arguments give the same plan for any number of workers.

    Args:
        model: to be converted; comes back as it was.
        batches: unlabelled inputs.
        patterns: candidates; of equally dense ones, those listed first are preferred.
        selection: which layers; default: all but the first and the last.
        choose: how.
        confidence: of `zeros`.
        most_error: of `error`, which needs it.
        budget: of `budget`, which needs it.
        reference: the dense model that an unstructured one came from: errors are predicted against it.
        retune_batch_norm: whether the conversion will.
        workers: threads that share the work.
        seed: of the sensitivities' random vectors.

    Raises:
        CalibrationError: no batches, NaN, or the model fails on them.
        SelectionError, PlanError: no layer is left, or a value that `choose` needs is missing or cannot be meant.
        BudgetError: no choice keeps the budget.
    """
    check_batches(batches)
    choice = select(model, patterns, selection or FOR_CONVERSION)
    dense = reference or model
    with one_thread():
        with model_errors():
            work = measure_work(model, head(batches[0], 2))
        scene = Scene(model, choice, work, patterns)
        if choose == "pattern":
            return plan_by_preference(scene)
        if choose == "zeros":
            return plan_by_zeros(scene, confidence)
        stops = {layer.name: (layer.name, *layer.tied) for layer in draft(model, choice, work, "").layers}
        with _Predictor(model, dense, batches, stops, retune_batch_norm, workers) as predict:
            if choose == "error":
                if most_error is None:
                    raise PlanError("choosing by error needs most_error, the relative error that a layer may have")
                return plan_by_error(scene, predict.estimate, most_error)
            if budget is None:
                raise PlanError("choosing under a budget needs one: max_dense, or work")
            with model_errors():
                sensitivities = measure_sensitivity(
                    dense, choice, patterns[0], _some(batches, _PROBED), seed=seed, retuned=retune_batch_norm
                )
            return plan_under_budget(scene, predict.estimate, after_later_layers(sensitivities, predict.order), budget)


class _Predictor:
    """Predicts errors of one layer after the other; suspended passes of the dense model bring the sums.

    Every fourth batch tests what is fitted to the others; a batch that is alone does both.

    Attributes:
        order: of execution, of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        batches: Sequence[Batch],
        stops: Mapping[str, tuple[str, ...]],
        retuned: bool,
        workers: int,
    ) -> None:
        self._model, self._dense = model, dense
        # one process plans, and tells the others
        self._group = Group(workers=workers)
        self._fitted, self._tested = (Collector(self._group, sequential=False) for _ in range(2))
        self._evaluating = evaluating(dense)
        with evaluating(dense), model_errors():
            order = schedule(dense, stops, batches[0], norms=retuned)
        self._normed = order.normed
        calls = {stop: count for stop, count in order.calls.items() if stop in stops}
        self.order = tuple(calls)
        self._left = list(calls)
        self._passes = Passes(dense, dict(enumerate(batches)), stops, calls, {}, workers)
        self._at: tuple[str, Objective, Objective] | None = None

    def __enter__(self) -> Self:
        self._evaluating.__enter__()
        try:
            with model_errors():
                self._passes.__enter__()
        except BaseException:
            self._evaluating.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._passes.__exit__(kind, error, trace)
        self._evaluating.__exit__(kind, error, trace)

    def estimate(self, name: str, pattern: Pattern) -> Estimate:
        """Of a layer, called in the order of execution."""
        if self._at is None or self._at[0] != name:
            self._at = name, *self._collect(name)
        weight = to_gemm(prunable_layer(self._model, name).weight.detach())
        _, fitted, tested = self._at
        halves = partial(self._fitted.halves, TRIED)
        return estimate_fitted(
            fitted, tested, weight, pattern, repair=self._repair(name), group=self._group, halves=halves
        )

    def _collect(self, name: str) -> tuple[Objective, Objective]:
        """To fit to, and to test on."""
        with model_errors():
            while self._left[0] != name:
                self._passes.leave(self._left.pop(0))
            seen = [
                Seen(one.inputs_of(name), one.inputs_of(name), None, attended(one.batch)) for one in self._passes.passes
            ]
            dense = prunable_layer(self._dense, name)
            ran = [one for one in seen if any(x.numel() for x in one.dense)]
            tested = ran[1::_TESTED] or ran
            left = [one for index, one in enumerate(ran) if index % _TESTED != 1]
            fitted, _ = self._fitted.collect(name, dense, [replace(one, half=at % 2) for at, one in enumerate(left)])
            return fitted, self._tested.collect(name, dense, tested)[0]

    def _repair(self, name: str) -> Repair:
        if name in self._normed:
            return "shift and scale"
        return "nothing" if prunable_layer(self._model, name).bias is None else "shift"


def _some(batches: Sequence[Batch], wanted: int) -> list[Batch]:
    """At most so many examples, from all over the batches: those of sentences go from short ones to long ones."""
    if count_examples(batches) <= wanted:
        return list(batches)
    spread = batches[:: ceil(len(batches) / wanted)]
    return [head(batch, max(1, wanted // len(spread))) for batch in spread]
