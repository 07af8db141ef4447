"""Which layers multiply with packed 2:4 weights: measured, layer by layer, where and as they train."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tnm_pipeline.training.kernels.semi_structured import PackedWeight
from tnm_pipeline.training.kernels.support import library_note, why_never, why_not_now
from tnm_pipeline.training.kernels.trial import Trial
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.timing import Comparison

Backend = Literal["auto", "masked", "sparse"]

_MOST_ERROR = 1e-2  # the largest difference to the masked product, over its largest value; bfloat16 rounds by 4e-3


class BackendError(ValueError):
    """A backend that does not exist."""


def check_backend(backend: str) -> None:
    """Refuse what is no `Backend`.

    Raises:
        BackendError: there is no such one.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"unknown backend {backend!r}: choose one of {', '.join(get_args(Backend))}")


class Packable(Protocol):
    """What is used of a layer."""

    weight: Tensor
    mask: Tensor
    packed: PackedWeight | None


@dataclass(frozen=True)
class Choice:
    """How one layer multiplies, and why.

    Attributes:
        layer: dotted module name.
        shape: of the weight.
        tokens: in the forward pass that decided: the product of the input's leading dimensions; None: none did.
        chosen: `masked` or `sparse`.
        why: in words.
        timing: None: not measured.
    """

    layer: str
    shape: tuple[int, ...]
    tokens: int | None
    chosen: Literal["masked", "sparse"]
    why: str
    timing: Comparison | None = None

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-able values."""
        return asdict(self)


class Packs:
    """Decides after the first optimizer step which layers multiply with packed weights; packs those after every step.

    `auto` times masked against sparse products, forward and backward, with as many tokens as the layer got, packing
    included, and takes the sparse ones only where they win by more than the noise; where they do not, the masked weight
    is kept in the format of the products from step to step, which costs less than masking in every pass. `sparse` takes
    sparse products wherever they are possible. Both compare them with the masked ones of each shape first.

    Nothing of this is state: after a resume it is decided anew. As a choice by time may then differ, and as the
    products round differently, a training that must repeat itself bit for bit takes `masked`.

    Args:
        layers: by name; those for which anything can come of it get an empty pack.
        pattern: that the masks hold.
        backend: `auto`, `masked` or `sparse`.
        micro_batches: forward and backward passes for each optimizer step, over which the time to pack is spread.
        never: why all layers stay masked whatever the backend; None: nothing speaks against packing.
    """

    def __init__(
        self,
        layers: Mapping[str, Packable],
        pattern: Pattern,
        backend: Backend,
        *,
        micro_batches: int = 1,
        never: str | None = None,
    ) -> None:
        self._layers = dict(layers)
        self._sparse_products: Literal[1, 2] = 2 if pattern.transposable else 1
        self._backend = backend
        self._micro_batches = micro_batches
        self._device: torch.device | None = None
        self._choices: dict[str, Choice] = {}
        self._trials: dict[tuple[object, ...], Choice] = {}
        self._undecided: dict[str, PackedWeight] = {}
        self._packed: dict[str, tuple[PackedWeight, torch.dtype]] = {}
        for name, layer in self._layers.items():
            if why := "asked for" if backend == "masked" else never or why_never(layer.weight, pattern):
                self._choices[name] = _masked(layer, None, why, name)
            else:
                self._undecided[name] = layer.packed = PackedWeight(self._sparse_products)
        self._warn_of_masked(self._choices)

    def after_step(self, leak: float = 0.0) -> None:
        """Pack what the next forward passes multiply with. Call it after the optimizer step and any change of masks.

        Args:
            leak: what pruned weights count in them; unless it is 0, no weight is 2:4 and every layer is masked.
        """
        if leak > 0:
            for packed, _ in self._packed.values():
                packed.invalidate()
            return
        decided = [name for name, packed in self._undecided.items() if packed.asked and packed.asked[0]]
        for name in decided:
            self._decide(name, self._undecided.pop(name))
        self._warn_of_masked(decided)
        for name, (packed, dtype) in self._packed.items():
            packed.refresh(self._layers[name].weight, self._layers[name].mask, dtype)

    def table(self) -> list[Choice]:
        """A row for each layer, in the order given."""
        unseen = "not decided: no training step has gone through it yet"
        return [self._choices.get(name) or _masked(layer, None, unseen, name) for name, layer in self._layers.items()]

    def remove(self) -> None:
        """Take all packs off the layers."""
        for layer in self._layers.values():
            layer.packed = None
        self._undecided, self._packed = {}, {}

    def _decide(self, name: str, packed: PackedWeight) -> None:
        layer = self._layers[name]
        assert packed.asked is not None
        tokens, dtype = packed.asked
        reason = why_not_now(layer.weight, dtype) or self._why_not_here(layer.weight.device)
        if reason:
            self._choices[name] = _masked(layer, tokens, reason, name)
            return
        assert dtype is not None
        case = (*layer.weight.shape, tokens, dtype)
        if case not in self._trials:
            self._trials[case] = self._try(layer, tokens, dtype)
        self._choices[name] = replace(self._trials[case], layer=name)
        packed.sparse_products = self._sparse_products if self._choices[name].chosen == "sparse" else 0
        self._packed[name] = packed, dtype

    def _why_not_here(self, device: torch.device) -> str | None:
        # torch 2.13 and earlier keep one cuSPARSELt handle for each thread, of the device that came first.
        self._device = self._device or device
        return None if device == self._device else f"it is on {device}: one process packs on one device, {self._device}"

    def _try(self, layer: Packable, tokens: int, dtype: torch.dtype) -> Choice:
        try:
            trial = Trial(layer.weight, layer.mask, tokens, dtype, self._sparse_products)
            wrong = [error for error in trial.errors() if not error <= _MOST_ERROR]  # NaN too
            timing = trial.compare(self._micro_batches) if self._backend == "auto" and not wrong else None
        except RuntimeError as failure:  # of a library or a device that nobody tried
            return _masked(layer, tokens, f"the sparse products fail: {str(failure).splitlines()[0]}")
        if wrong:
            return _masked(layer, tokens, f"the sparse products are wrong by {wrong[0]:.2g}: please report this")
        if timing is None:
            return Choice("", tuple(layer.weight.shape), tokens, "sparse", "asked for")
        if timing.wins:
            return Choice("", tuple(layer.weight.shape), tokens, "sparse", "faster", timing)
        note = library_note(layer.weight.device)
        return replace(_masked(layer, tokens, f"sparse is not clearly faster{note}"), timing=timing)

    def _warn_of_masked(self, names: Iterable[str]) -> None:
        """Say which layers do not do what `sparse` asked for."""
        if self._backend != "sparse":
            return
        reasons: dict[str, list[str]] = {}
        for name in names:
            if self._choices[name].chosen == "masked":
                reasons.setdefault(self._choices[name].why, []).append(name)
        for reason, skipped in reasons.items():
            warnings.warn(
                f"backend sparse: {len(skipped)} of {len(self._layers)} layers multiply with masked weights, "
                f"{skipped[0]} for one: {reason}",
                stacklevel=3,
            )


def _masked(layer: Packable, tokens: int | None, why: str, name: str = "") -> Choice:
    return Choice(name, tuple(layer.weight.shape), tokens, "masked", why)


def format_table(choices: Sequence[Choice]) -> str:
    """The choices as lines of text: times in milliseconds, the ratio with its quartiles over one optimizer step."""
    header = ("layer", "weight", "tokens", "masked ms", "prepare ms", "sparse ms", "pack ms", "times faster", "chosen")
    rows = [(*header, "why"), *(_cells(choice) for choice in choices)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cells(choice: Choice) -> tuple[str, ...]:
    timing = choice.timing
    measured: tuple[str, ...] = ("-",) * 5
    if timing:
        times = (timing.masked_ms, timing.prepare_ms, timing.sparse_ms, timing.pack_ms)
        measured = (*(f"{time:.3f}" for time in times), f"{timing.ratio:.2f} ({timing.low:.2f}-{timing.high:.2f})")
    shape = " x ".join(map(str, choice.shape))
    tokens = "-" if choice.tokens is None else str(choice.tokens)
    return choice.layer, shape, tokens, *measured, choice.chosen, choice.why
