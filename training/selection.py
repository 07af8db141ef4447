"""Which layers of a model become sparse, and why the others do not."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.pattern import Pattern


class SelectionError(ValueError):
    """No layer of the model can become sparse under the rules given."""


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
class Choice:
    """What a selection means for one model.

    Attributes:
        chosen: names of the layers that become sparse, in registration order.
        skipped: name -> reason, for every other Linear and Conv2d.
    """

    chosen: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, pattern: Pattern, selection: Selection | None = None) -> Choice:
    """Decide layer by layer. A weight that several modules share stays dense: some of them would not mask it.

    Args:
        model: any module.
        pattern: its M decides which shapes can ever be accelerated.
        selection: the rules; default: every layer but the last.

    Returns:
        The choice, printable before any work is done.

    Raises:
        SelectionError: nothing is left to make sparse; the message lists the reasons.
    """
    rules = selection or Selection()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
    users = _users_of_weights(model)
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for position, (name, layer) in enumerate(layers):
        others = [user for user in users.get(id(layer.weight), ()) if user != name]
        if others:
            skipped[name] = f"shares its weight with {', '.join(others)}"
        elif rules.keep_last and position == len(layers) - 1:
            skipped[name] = "last layer, kept dense (keep_last = true)"
        elif reason := _reason_to_skip(name, layer, pattern, rules):
            skipped[name] = reason
        else:
            chosen.append(name)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no Linear or Conv2d layer"
        raise SelectionError(f"no layer can become {pattern}: {reasons}")
    return Choice(tuple(chosen), skipped)


def _users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Id of a parameter -> names of the modules, of any type, that hold it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def _reason_to_skip(name: str, layer: nn.Module, pattern: Pattern, rules: Selection) -> str | None:
    if not any(fnmatchcase(name, glob) for glob in rules.include):
        return f"not included by {', '.join(rules.include)}"
    for glob in rules.exclude:
        if fnmatchcase(name, glob):
            return f"excluded by {glob}"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from other parameters: make it permanent first (torch.nn.utils.prune.remove ...)"
    if type(layer) not in PRUNABLE:
        return f"a {type(layer).__name__}: only plain Linear and Conv2d surely use their weight as is"
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
