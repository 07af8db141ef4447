"""Which pattern each layer gets: the same for all, by its zeros, by its error, or under a budget for the network.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite

from torch import Tensor, nn

from tnm_pipeline.training.convert.budget import Budget, BudgetError, choose
from tnm_pipeline.training.convert.estimate import Estimate
from tnm_pipeline.training.convert.plan import Candidate, LayerPlan, Plan, PlanError, draft
from tnm_pipeline.training.convert.sensitivity import Sensitivity
from tnm_pipeline.training.convert.work import Work
from tnm_pipeline.training.masks import count_violations, kept_magnitude, solve
from tnm_pipeline.training.masks.diversity import violation_probability
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice, misfit

Estimator = Callable[[str, Pattern], Estimate]
"""Called as ``estimator(name, pattern)``, all patterns of a layer in a row, layers in the order of execution."""


@dataclass(frozen=True)
class Scene:
    """What every way of choosing starts from.

    Attributes:
        model: to be converted; not changed.
        choice: the layers that the rules leave.
        work: of `measure_work`.
        patterns: candidates; of equally dense ones, those listed first are preferred.
    """

    model: nn.Module
    choice: Choice
    work: Work
    patterns: Sequence[Pattern]

    def weight(self, name: str) -> Tensor:
        """Of a layer, detached."""
        return self.model.get_submodule(name).get_parameter("weight").detach()

    def draft(self, rule: str, look: Callable[[str, Pattern], Candidate]) -> Plan:
        """All layers with the candidates that fit them looked at, sparsest first, and nothing decided."""
        plan = draft(self.model, self.choice, self.work, rule)
        ordered = sorted(self.patterns, key=lambda pattern: pattern.density)
        layers = [replace(layer, candidates=self._candidates(layer.name, ordered, look)) for layer in plan.layers]
        return replace(plan, layers=tuple(layers))

    def _candidates(
        self, name: str, ordered: Sequence[Pattern], look: Callable[[str, Pattern], Candidate]
    ) -> tuple[Candidate, ...]:
        candidates = []
        for pattern in ordered:
            reason = misfit(self.model.get_submodule(name), pattern)
            if reason:
                candidates.append(Candidate(pattern, rejected=reason))
                continue
            weight = self.weight(name)
            kept = kept_magnitude(weight, solve(weight, pattern))
            candidates.append(replace(look(name, pattern), kept_magnitude=kept))
        return (*candidates, Candidate(None, kept_magnitude=1.0, predicted_error=0.0, effect=0.0))


def plan_by_preference(scene: Scene) -> Plan:
    """The first pattern, for every layer that it fits; others take the next one that does."""
    plan = scene.draft("first pattern that fits", lambda _, pattern: Candidate(pattern))
    layers = []
    for layer in plan.layers:
        by_pattern = {candidate.pattern: candidate for candidate in layer.candidates}
        taken = next(by_pattern[pattern] for pattern in scene.patterns if by_pattern[pattern].rejected is None)
        rejections = dict.fromkeys(by_pattern, f"{taken} comes first")
        layers.append(layer.settled(taken, "the first pattern that fits", rejections))
    return replace(plan, layers=tuple(layers))


def plan_by_zeros(scene: Scene, confidence: float = 0.95) -> Plan:
    """From an unstructured checkpoint: the sparsest pattern that its zeros hold almost everywhere already.

    A pattern passes if a group of it would break with probability at most 1 - confidence, were the layer's zeros spread
    at random (Hubara et al. 2021, section 5). The share of groups that really break it stands beside it.

    Args:
        scene: what to choose from.
        confidence: that a group holds the pattern, in [0, 1].

    Raises:
        PlanError: a confidence outside [0, 1], or none of the chosen layers runs.
    """
    if not 0 <= confidence <= 1:
        raise PlanError(f"confidence is a probability, such as 0.95; got {confidence}")
    limit = 1 - confidence

    def look(name: str, pattern: Pattern) -> Candidate:
        weight = scene.weight(name)
        expected = violation_probability(pattern, _zeros(weight))
        return Candidate(pattern, violation_probability=expected, violating=_violating(weight, pattern))

    plan = scene.draft(f"zeros at confidence {confidence:g}", look)
    layers = []
    for layer in plan.layers:
        passing = [
            c for c in layer.candidates if c.violation_probability is not None and c.violation_probability <= limit
        ]
        rejections: dict[Pattern | None, str] = {
            c.pattern: f"{c.violation_probability:.1%} of groups expected to violate it, more than {limit:.1%}"
            for c in layer.candidates
            if c.violation_probability is not None
        }
        taken = passing[0] if passing else layer.candidates[-1]
        zeros = f"{_zeros(scene.weight(layer.name)):.1%} zeros"
        if passing:
            rejections |= _less_sparse(passing, taken) | {None: f"{taken} loses almost nothing"}
            reason = (
                f"{zeros}: {taken.violation_probability:.1%} of groups expected to violate it, {taken.violating:.1%} do"
            )
        else:
            reason = f"{zeros}: too few for any of the patterns"
        layers.append(layer.settled(taken, reason, rejections))
    return replace(plan, layers=tuple(layers))


def plan_by_error(scene: Scene, estimate: Estimator, most_error: float) -> Plan:
    """For each layer the sparsest pattern whose predicted error is small enough; dense if none is.

    Args:
        scene: what to choose from.
        estimate: of a layer under a pattern.
        most_error: relative error of a layer's output, positive.

    Raises:
        PlanError: a limit that is not positive, or none of the chosen layers runs.
    """
    if not most_error > 0:
        raise PlanError(f"most_error is the relative error a layer may have, such as 0.25; got {most_error}")
    plan = scene.draft(
        f"predicted error up to {most_error:g}",
        lambda name, pattern: Candidate(pattern, predicted_error=estimate(name, pattern).relative_error),
    )
    layers = []
    for layer in plan.layers:
        looked = [candidate for candidate in layer.candidates[:-1] if candidate.rejected is None]
        rejections: dict[Pattern | None, str] = {
            c.pattern: f"predicted error {c.predicted_error:.3f} > {most_error:g}" for c in looked
        }
        passing = [c for c in looked if c.predicted_error is not None and c.predicted_error <= most_error]
        taken = passing[0] if passing else layer.candidates[-1]
        if passing:
            rejections |= _less_sparse(passing, taken) | {None: f"{taken} is within the limit"}
        reason = f"predicted error {taken.predicted_error:.3f}" if passing else "no pattern is within the limit"
        layers.append(layer.settled(taken, reason, rejections))
    return replace(plan, layers=tuple(layers))


def plan_under_budget(
    scene: Scene, estimate: Estimator, sensitivities: Mapping[str, Sensitivity], budget: Budget
) -> Plan:
    """The patterns, dense included, that change the network's output least among all that keep the budget.

    Args:
        scene: what to choose from.
        estimate: of a layer under a pattern.
        sensitivities: of all chosen layers that run.
        budget: for the work of the chosen layers.

    Raises:
        BudgetError: the sparsest patterns together are above the budget.
        PlanError: an effect that is NaN or Inf, or none of the chosen layers runs.
    """

    def look(name: str, pattern: Pattern) -> Candidate:
        relative, squared = estimate(name, pattern)
        effect = sensitivities[name].effect(squared)
        if not isfinite(effect):
            raise PlanError(f"layer {name} at {pattern} has a predicted effect of {effect}: check the calibration data")
        return Candidate(pattern, predicted_error=relative, effect=effect)

    plan = scene.draft(f"least effect, {budget}", look)
    options = [[candidate for candidate in layer.candidates if candidate.rejected is None] for layer in plan.layers]
    costs = [
        [budget.cost(layer.work, candidate.pattern) for candidate in of_layer]
        for layer, of_layer in zip(plan.layers, options, strict=True)
    ]
    effects = [[candidate.effect or 0.0 for candidate in of_layer] for of_layer in options]
    total = sum(layer.work for layer in plan.layers)
    least = sum(min(item) for item in costs)
    if least > budget.limit(total):
        raise BudgetError(
            f"the sparsest patterns leave {float(least / total):.1%} of the work, and {budget} allows less: raise it, "
            "or add a sparser pattern such as 1:4"
        )
    picks = choose(effects, costs, budget.limit(total))
    layers = [
        _settle_under_budget(layer, of_layer[pick], layer.work / total)
        for layer, of_layer, pick in zip(plan.layers, options, picks, strict=True)
    ]
    return replace(plan, layers=tuple(layers))


def _settle_under_budget(layer: LayerPlan, taken: Candidate, share: float) -> LayerPlan:
    """Say what each alternative would have meant; `share` is the layer's, of the work of all chosen layers."""
    rejections: dict[Pattern | None, str] = {}
    for other in layer.candidates:
        if other.effect is None or taken.effect is None:  # it does not fit: the reason is there already
            continue
        saves = other.effect < taken.effect
        rejections[other.pattern] = f"effect {other.effect:.2g}" + (
            ", but the budget does more elsewhere" if saves else ""
        )
    if taken.pattern:
        return layer.settled(taken, f"effect {taken.effect:.2g} on {share:.1%} of the work", rejections)
    least = min(other.effect for other in layer.candidates[:-1] if other.effect is not None)
    return layer.settled(taken, f"would have an effect of {least:.2g} on {share:.1%} of the work", rejections)


def _less_sparse(passing: Sequence[Candidate], taken: Candidate) -> dict[Pattern | None, str]:
    """Why not the others that would do: less sparse, or asked for later."""
    density = taken.pattern.density if taken.pattern else 1.0
    return {
        other.pattern: f"{taken} is sparser and will do"
        if other.pattern and other.pattern.density > density
        else f"{taken} will do and is listed first"
        for other in passing
    }


def _zeros(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


def _violating(weight: Tensor, pattern: Pattern) -> float:
    """Share of the groups that break a pattern, both ways for a transposable one."""
    matrix_rows, columns = len(weight), weight[0].numel()
    groups = matrix_rows * ceil(columns / pattern.m)
    if pattern.transposable:
        groups += ceil(matrix_rows / pattern.m) * columns
    return count_violations(weight, pattern).of(pattern) / groups
