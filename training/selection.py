"""Which layers of a model become sparse, and why the others do not."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tnm_pipeline.training.distributed import plain_type
from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.pattern import Pattern

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm)  # their weight may have two dimensions, but multiplies entry by entry

_Matcher = Callable[[str, nn.Module], bool]


class SelectionError(ValueError):
    """Rules that cannot be meant: none of the layers is left, a rule matches nothing, or it cannot be read."""


@dataclass(frozen=True)
class Selection:
    r"""Rules that pick layers.

    A rule is a glob of the whole name (`encoder.*.dense`), `re:` and a regular expression searched for in the name
    (`re:^encoder\.layer\.\d+\.`), or `type:` and the name of the layer's class or of one that it derives from
    (`type:Conv2d`).

    Attributes:
        include: rules; a layer must match one.
        exclude: rules; a layer must match none.
        keep_last: leave the prunable layer dense that is registered last: usually the classifier, as in the paper.
        keep_first: leave the layer dense that is registered first: usually the one that reads the input. Where that is
            an embedding, or of another type that stays dense anyway, no other one is left out.
        tied: choose a weight that several layers share, once for all of them. Only for what never replaces the
            layers themselves: a conversion may, training with masks may not.
        subclasses: choose classes derived from Linear and Conv2d too. Only for what checks on data that they compute
            what a plain layer with their weight does, as a conversion's plan does.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_last: bool = True
    keep_first: bool = False
    tied: bool = False
    subclasses: bool = False


FOR_CONVERSION = Selection(keep_first=True, tied=True, subclasses=True)
"""What a conversion does unless told otherwise: layers registered first and last dense, shared weights handled once."""


@dataclass(frozen=True)
class Choice:
    """What a selection means for one model.

    Attributes:
        chosen: names of the layers that become sparse, in registration order.
        skipped: name -> reason, for every other Linear and Conv2d.
        tied: name of a chosen layer -> names of the other layers that hold the same weight.
        unsupported: name -> reason, for modules of other types that multiply with a weight of their own.
    """

    chosen: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, pattern: Pattern | Sequence[Pattern], selection: Selection | None = None) -> Choice:
    """Decide layer by layer.

    A weight that several modules share stays dense, unless `selection.tied` and all of them are layers of one type that
    the rules allow.

    Args:
        model: any module.
        pattern: its M decides which shapes can ever be accelerated. Of several, one must fit.
        selection: the rules; default: every layer but the one registered last.

    Returns:
        The choice, printable before any work is done.

    Raises:
        SelectionError: nothing is left to make sparse, a rule matches no layer, or a rule cannot be read; the message
            lists the reasons, or the names that are closest.
    """
    rules = selection or Selection()
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    complaints = _complaints(model, layers, rules)
    own_reasons = _own_reasons(model, layers, patterns, rules)
    users = _users_of_weights(model)
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    tied: dict[str, tuple[str, ...]] = {}
    for name, layer in layers.items():
        others = tuple(user for user in users.get(id(layer.weight), ()) if user != name)
        reason = _reason_of_sharing(name, others, layers, own_reasons, rules) if others else own_reasons[name]
        if reason:
            skipped[name] = reason
        elif not any(name in names for names in tied.values()):
            chosen.append(name)
            if others:
                tied[name] = others
    if not chosen:
        reasons = [f"{name}: {reason}" for name, reason in skipped.items()] or ["no Linear or Conv2d layer"]
        text = " or ".join(map(str, patterns))
        raise SelectionError(f"no layer can become {text}: {'; '.join([*complaints, *reasons])}")
    if complaints:
        raise SelectionError("; ".join(complaints))
    return Choice(tuple(chosen), skipped, tied, _unsupported(model))


def misfit(layer: nn.Module, pattern: Pattern) -> str | None:
    """Why no group of a pattern fits the inputs of a Linear or an ungrouped Conv2d; `None`: groups fit."""
    assert isinstance(layer, PRUNABLE)
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    if inputs % pattern.m == 0:
        return None
    return f"{inputs} inputs are not a multiple of {pattern.m}: no group of {pattern} fits"


def _own_reasons(
    model: nn.Module, layers: Mapping[str, nn.Module], patterns: Sequence[Pattern], rules: Selection
) -> dict[str, str | None]:
    """Name -> why the layer is skipped whoever shares its weight, or `None`."""
    first = _first_layer(model) if rules.keep_first else None
    last = list(layers)[-1] if rules.keep_last and layers else None
    reasons: dict[str, str | None] = {}
    for name, layer in layers.items():
        if name == last:
            reasons[name] = "registered last, kept dense (keep_last = true)"
        elif layer is first:
            reasons[name] = "registered first, kept dense (keep_first = true)"
        else:
            reasons[name] = _reason_of_rules(name, layer, rules) or _reason_of_kind(layer, patterns, rules)
    return reasons


def _reason_of_rules(name: str, layer: nn.Module, rules: Selection) -> str | None:
    if not any(_matcher(rule)(name, layer) for rule in rules.include):
        return f"not included by {', '.join(rules.include)}"
    return next((f"excluded by {rule}" for rule in rules.exclude if _matcher(rule)(name, layer)), None)


def _reason_of_kind(layer: nn.Module, patterns: Sequence[Pattern], rules: Selection) -> str | None:
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from other parameters: make it permanent first (torch.nn.utils.prune.remove ...)"
    if plain_type(layer) is NonDynamicallyQuantizableLinear:
        return (
            "a NonDynamicallyQuantizableLinear, whose weight nn.MultiheadAttention reads itself: "
            "write the attention with Linear layers"
        )
    if not layer.get_parameter("weight").is_floating_point():
        return f"its weight is {layer.get_parameter('weight').dtype}: quantized before it was made sparse"
    if plain_type(layer) not in PRUNABLE and not rules.subclasses:
        return f"a {plain_type(layer).__name__}: only plain Linear and Conv2d surely use their weight as is"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"grouped convolution ({layer.groups} groups)"
    misfits = [misfit(layer, pattern) for pattern in patterns]
    return None if None in misfits else "; ".join(filter(None, misfits))


def _reason_of_sharing(
    name: str,
    others: Sequence[str],
    layers: Mapping[str, nn.Module],
    own_reasons: Mapping[str, str | None],
    rules: Selection,
) -> str | None:
    """Why a layer is skipped whose weight is also that of other modules."""
    shares = f"shares its weight with {', '.join(others)}"
    if not rules.tied:
        return shares
    if any(type(layers.get(other)) is not type(layers[name]) for other in others):
        return f"{shares}: not all of them are {type(layers[name]).__name__} layers"
    theirs = next(
        (f"{shares}; {other} is skipped: {own_reasons[other]}" for other in others if own_reasons[other]), None
    )
    return own_reasons[name] or theirs


def _users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Id of a parameter -> names of the modules, of any type, that hold it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def _first_layer(model: nn.Module) -> nn.Module | None:
    return next(
        (module for module in model.modules() if isinstance(module, PRUNABLE + _LOOKUPS) or _multiplies(module)), None
    )


def _multiplies(module: nn.Module) -> bool:
    """Whether a module of another type seems to multiply with a weight: recurrent, transposed, one-dimensional ..."""
    if isinstance(module, PRUNABLE + _LOOKUPS + _ELEMENTWISE):
        return False
    own = module.named_parameters(recurse=False)
    return any("weight" in name and parameter.dim() >= 2 for name, parameter in own)


def _unsupported(model: nn.Module) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[name] = (
                "nn.MultiheadAttention multiplies with in_proj_weight and out_proj.weight inside a fused function: "
                "write the attention with Linear layers"
            )
        elif _multiplies(module):
            reasons[name] = f"a {type(module).__name__}: only Linear and Conv2d become N:M; write it with one of them"
    return reasons


def _matcher(rule: str) -> _Matcher:
    """A rule as a test of a module and its name.

    Raises:
        SelectionError: the regular expression is malformed.
    """
    kind, _, text = rule.partition(":")
    if kind == "type":
        return lambda name, module: any(base.__name__ == text for base in type(module).__mro__)
    if kind != "re":
        return lambda name, module: fnmatchcase(name, rule)
    try:
        expression = re.compile(text)
    except re.error as error:
        raise SelectionError(f"cannot read the rule {rule!r}: {error}; escape a dot as \\.") from error
    return lambda name, module: expression.search(name) is not None


def _complaints(model: nn.Module, layers: Mapping[str, nn.Module], rules: Selection) -> list[str]:
    """One sentence for every rule that matches no layer: likely a slip of the pen."""
    if not layers:
        return []
    kinds = [("include", rule) for rule in rules.include] + [("exclude", rule) for rule in rules.exclude]
    complaints = [_complaint(kind, rule, model, layers) for kind, rule in kinds]
    return [complaint for complaint in complaints if complaint]


def _complaint(kind: str, rule: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> str | None:
    matches = _matcher(rule)
    if any(matches(name, layer) for name, layer in layers.items()):
        return None
    others = {name: module for name, module in model.named_modules() if matches(name, module)}
    outer = next(
        (name for name, module in others.items() if any(isinstance(m, PRUNABLE) for m in module.modules())), None
    )
    problem = f"the {kind} rule {rule!r} matches no Linear or Conv2d layer"
    if outer is not None:
        return f"{problem}, only what contains some: write '{outer}.*' for the layers inside {outer or 'it'}"
    if others:  # what an exclude rule names stays dense, as asked
        name, module = next(iter(others.items()))
        return None if kind == "exclude" else f"{problem}, only {name} ({type(module).__name__})"
    return f"{problem}; the closest: {', '.join(_closest(rule, model, layers))}"


def _closest(rule: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """What a rule without a match may have meant, at most three."""
    if rule.startswith("type:"):
        return [f"type:{name}" for name in sorted({type(layer).__name__ for layer in layers.values()})]
    written = re.sub(r"^re:|[*?^$\\]", "", rule).strip(".")
    names = [
        name
        for name, module in model.named_modules()
        if name and any(isinstance(m, PRUNABLE) for m in module.modules())
    ]
    return get_close_matches(written, names, n=3, cutoff=0.0)
