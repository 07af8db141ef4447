"""What a conversion is going to do, to be read before it starts: every layer, its pattern, and why not another."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import sqrt

from torch import nn

from tnm_pipeline.training.convert.work import Work
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice


class PlanError(ValueError):
    """A plan that cannot be made, such as one that leaves no layer to convert."""


@dataclass(frozen=True)
class Candidate:
    """One way to treat a layer. What was not looked at is `None`.

    Attributes:
        pattern: `None`: dense.
        rejected: why not; `None`: it is the layer's pattern.
        kept_magnitude: of the weight by the magnitude mask, in [0, 1].
        violation_probability: that a group breaks the pattern, for zeros that are spread at random.
        violating: share of the groups that do break it.
        predicted_error: relative, of the layer's output.
        effect: predicted relative squared change of the network's output.
    """

    pattern: Pattern | None
    rejected: str | None = None
    kept_magnitude: float | None = None
    violation_probability: float | None = None
    violating: float | None = None
    predicted_error: float | None = None
    effect: float | None = None

    def __str__(self) -> str:
        return "dense" if self.pattern is None else str(self.pattern)


@dataclass(frozen=True)
class LayerPlan:
    """What will become of one chosen layer.

    Attributes:
        name: in the model.
        type: `Linear` or `Conv2d`.
        gemm_shape: (O, K) of its GEMM matrix.
        work: multiply-adds per example while dense, those of layers that share its weight included.
        candidates: everything that was considered; one of them is not rejected.
        reason: why that one.
        tied: names of the other layers that hold the same weight.
    """

    name: str
    type: str
    gemm_shape: tuple[int, int]
    work: int
    candidates: tuple[Candidate, ...]
    reason: str
    tied: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The candidate that was taken."""
        return next(candidate for candidate in self.candidates if candidate.rejected is None)

    @property
    def pattern(self) -> Pattern | None:
        """What it becomes; `None`: it stays dense."""
        return self.chosen.pattern

    @property
    def work_left(self) -> float:
        """Multiply-adds per example afterwards."""
        return self.work * (1.0 if self.pattern is None else self.pattern.density)

    def settled(self, taken: Candidate, reason: str, rejections: Mapping[Pattern | None, str]) -> "LayerPlan":
        """The layer with a decision.

        Args:
            taken: one of its candidates.
            reason: why.
            rejections: pattern -> why not, for all other candidates that had no reason yet.
        """
        others = [
            c if c is taken or c.rejected else replace(c, rejected=rejections[c.pattern]) for c in self.candidates
        ]
        return replace(self, candidates=tuple(others), reason=reason)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was never up for choice.

    Attributes:
        name: in the model.
        type: of the module.
        reason: why not.
        work: multiply-adds per example; 0 where they were not measured.
    """

    name: str
    type: str
    reason: str
    work: int


@dataclass(frozen=True)
class Plan:
    """The whole of it.

    Attributes:
        layers: in the order of their last calls, which is that of the conversion.
        skipped: the rest.
        rule: how patterns were chosen, in a few words.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[SkippedLayer, ...]
    rule: str

    @property
    def patterns(self) -> dict[str, Pattern]:
        """Layer -> pattern, for the layers that change, in the order of execution."""
        return {layer.name: layer.pattern for layer in self.layers if layer.pattern is not None}

    @property
    def stops(self) -> dict[str, tuple[str, ...]]:
        """Layer -> itself and the layers that share its weight, for the layers that change."""
        return {layer.name: (layer.name, *layer.tied) for layer in self.layers if layer.pattern is not None}

    @property
    def work(self) -> int:
        """Multiply-adds per example of the dense model, as far as they were measured."""
        return sum(layer.work for layer in self.layers) + sum(layer.work for layer in self.skipped)

    @property
    def work_left(self) -> float:
        """What remains of them."""
        return sum(layer.work_left for layer in self.layers) + sum(layer.work for layer in self.skipped)

    @property
    def effect(self) -> float | None:
        """Predicted relative squared change of the network's output; `None` where no sensitivity was measured."""
        effects = [layer.chosen.effect for layer in self.layers]
        return None if None in effects else sum(filter(None, effects))

    def summary(self) -> str:
        """One sentence with the figures that matter."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[str(layer.chosen)] = counts.get(str(layer.chosen), 0) + 1
        what = ", ".join(f"{count} {pattern}" for pattern, count in sorted(counts.items()))
        text = f"{len(self.layers)} layers ({self.rule}): {what}; {len(self.skipped)} skipped"
        if self.work:
            text += f"; {self.work_left / self.work:.0%} of the multiply-adds remain"
        if self.effect is not None:
            text += f"; predicted change of the output: {sqrt(self.effect):.2f}"
        return text

    def rows(self) -> list[dict[str, str]]:
        """A table for people: column -> text, the same columns in each row, `-` where nothing is known."""
        return [self._row(layer) for layer in self.layers] + [self._skipped_row(layer) for layer in self.skipped]

    def to_dict(self) -> dict[str, object]:
        """For JSON; patterns in their text form."""
        return {
            "rule": self.rule,
            "layers": [_plain(layer) for layer in self.layers],
            "skipped": [asdict(layer) for layer in self.skipped],
            "work": self.work,
            "work_left": self.work_left,
            "effect": self.effect,
        }

    def _row(self, layer: LayerPlan) -> dict[str, str]:
        taken = layer.chosen
        others = [candidate for candidate in layer.candidates if candidate is not taken]
        return {
            "layer": ", ".join((layer.name, *layer.tied)),
            "type": layer.type,
            "matrix": f"{layer.gemm_shape[0]} x {layer.gemm_shape[1]}",
            "work": f"{layer.work / self.work:.1%}" if self.work else "-",
            "pattern": str(taken),
            "kept": _text(taken.kept_magnitude, ".3f"),
            "predicted error": _text(taken.predicted_error, ".3f"),
            "effect": _text(taken.effect, ".2g"),
            "why": layer.reason,
            "why not": "; ".join(f"{candidate}: {candidate.rejected}" for candidate in others) or "-",
        }

    def _skipped_row(self, layer: SkippedLayer) -> dict[str, str]:
        return {
            "layer": layer.name,
            "type": layer.type,
            "matrix": "-",
            "work": f"{layer.work / self.work:.1%}" if layer.work else "-",
            "pattern": "dense",
            "kept": "-",
            "predicted error": "-",
            "effect": "-",
            "why": layer.reason,
            "why not": "-",
        }


def draft(model: nn.Module, choice: Choice, work: Work, rule: str) -> Plan:
    """The layers of a choice without any candidate yet, and those that will not be looked at.

    Args:
        model: any module.
        choice: what the rules leave.
        work: of `measure_work`.
        rule: for the plan.

    Raises:
        PlanError: none of the chosen layers runs as it should.
    """
    modules = dict(model.named_modules())
    place = {name: index for index, name in enumerate(work.products)}
    dropped: dict[str, str] = {}
    layers: dict[int, LayerPlan] = {}
    for name in choice.chosen:
        tied = choice.tied.get(name, ())
        runs = [one for one in (name, *tied) if one in place]
        unlike = next((one for one in runs if one in work.unlike), None)
        if unlike is not None:
            dropped[name] = f"a {type(modules[name]).__name__}: {unlike} does not compute what a plain layer would"
        elif not runs:
            dropped[name] = "does not run on the first calibration batch"
        else:
            products = sum(work.products[one] for one in runs)
            layers[max(place[one] for one in runs)] = _layer(name, modules[name], products, tied)
    if not layers:
        raise PlanError(f"no layer is left to convert: {'; '.join(f'{name}: {why}' for name, why in dropped.items())}")
    skipped = [
        SkippedLayer(name, type(modules[name]).__name__, why, work.products.get(name, 0))
        for name, why in (choice.skipped | choice.unsupported | dropped).items()
    ]
    return Plan(tuple(layers[index] for index in sorted(layers)), tuple(skipped), rule)


def _layer(name: str, layer: nn.Module, products: int, tied: tuple[str, ...]) -> LayerPlan:
    rows, columns = to_gemm(layer.get_parameter("weight")).shape
    return LayerPlan(name, type(layer).__name__, (rows, columns), products, (), "", tied)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(layer: LayerPlan) -> dict[str, object]:
    candidates = [asdict(candidate) | {"pattern": str(candidate)} for candidate in layer.candidates]
    return asdict(layer) | {"pattern": str(layer.chosen), "candidates": candidates, "work_left": layer.work_left}
