"""Which layers of a model become sparse, and why the others do not."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.pattern import Pattern


@dataclass(frozen=True)
class Selection:
    """Rules that pick layers by name.

    Attributes:
        include: globs; a layer must match one.
        exclude: globs; a layer must match none.
        keep_last: leave the last prunable layer dense: it is usually the classifier, as in the paper.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_last: bool = True


@dataclass(frozen=True)
class Plan:
    """What a selection means for one model.

    Attributes:
        chosen: names of the layers that become sparse, in registration order.
        skipped: name -> reason, for every other Linear and Conv2d.
    """

    chosen: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, pattern: Pattern, selection: Selection | None = None) -> Plan:
    """Decide layer by layer. A weight shared by several layers is decided once, by its first name.

    Args:
        model: any module.
        pattern: its M decides which shapes can ever be accelerated.
        selection: the rules; default: every layer but the last.

    Returns:
        The plan, printable before any work is done.

    Raises:
        ValueError: nothing is left to make sparse; the message lists the reasons.
    """
    rules = selection or Selection()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
    seen: dict[int, str] = {}
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for position, (name, layer) in enumerate(layers):
        owner = seen.setdefault(id(layer.weight), name)
        if owner != name:
            skipped[name] = f"shares its weight with {owner}"
        elif rules.keep_last and position == len(layers) - 1:
            skipped[name] = "last layer, kept dense (keep_last = true)"
        elif reason := _reason_to_skip(name, layer, pattern, rules):
            skipped[name] = reason
        else:
            chosen.append(name)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no Linear or Conv2d layer"
        raise ValueError(f"no layer can become {pattern}: {reasons}")
    return Plan(tuple(chosen), skipped)


def _reason_to_skip(name: str, layer: nn.Module, pattern: Pattern, rules: Selection) -> str | None:
    if not any(fnmatchcase(name, glob) for glob in rules.include):
        return f"not included by {', '.join(rules.include)}"
    for glob in rules.exclude:
        if fnmatchcase(name, glob):
            return f"excluded by {glob}"
    if type(layer) not in PRUNABLE:
        return f"a {type(layer).__name__}: only plain Linear and Conv2d surely use their weight as is"
    if parametrize.is_parametrized(layer, "weight"):
        return "its weight is parametrized: remove the parametrization first"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return f"grouped convolution ({layer.groups} groups)"
        inputs = layer.in_channels
    else:
        assert isinstance(layer, nn.Linear)
        inputs = layer.in_features
    if inputs % pattern.m:
        return f"{inputs} inputs are not a multiple of {pattern.m}: no group of {pattern} fits"
    return None
