"""Renumber the channels between layers and rotate attention heads, before anything else, so that masks keep more.

The network computes the same afterwards. Which weights stand side by side in a group, and so compete for its places,
is a matter of numbering; where a producer's outputs reach its consumers channel by channel, the numbering is free, and
inside attention heads the whole basis is (`rotation.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, head
from tnm_pipeline.training.convert.channel_search import search_order
from tnm_pipeline.training.convert.heads import HeadPart, HeadSpace, find_head_spaces
from tnm_pipeline.training.convert.permutation import Chain, importances, permutable, permute
from tnm_pipeline.training.convert.plan import Plan
from tnm_pipeline.training.convert.rotation import Rotation, search_rotation
from tnm_pipeline.training.convert.tracing import DataflowError, trace

_SWEEPS = 3  # of the search: 95% of what 30 gain


@dataclass(frozen=True, eq=False)
class Reordering:
    """The new numbering of one chain of layers.

    Attributes:
        chain: the layers.
        order: (C,) int64: channel k is what channel `order[k]` was.
        kept_before: share of the magnitude that the masks of the chain keep without it.
        kept_after: and with it.
    """

    chain: Chain
    order: Tensor
    kept_before: float
    kept_after: float

    def apply(self, model: nn.Module) -> None:
        """Renumber in place.

        Args:
            model: the traced one, or one with the same modules.
        """
        permute(model, self.chain, self.order)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "producer": self.chain.producer,
            "consumers": list(self.chain.consumers),
            "order": self.order.tolist(),
            "kept_before": self.kept_before,
            "kept_after": self.kept_after,
        }


def find_reorderings(model: nn.Module, plan: Plan, example: Batch) -> list[Reordering | Rotation]:
    """Search the numbering of every chain and the basis of all heads that masks depend on, by what these would keep.

    Chains whose consumers have several patterns, or one that does not divide the channels, stay as they are; so does
    everything if the model's dataflow cannot be seen.

    Args:
        model: in evaluation mode, not changed for good.
        plan: which layers get which pattern.
        example: a batch, of which the first examples are run.
    """
    try:
        flow = trace(model, head(example, 2))
    except DataflowError:
        return []
    patterns = plan.patterns
    rotations = (search_rotation(model, space, patterns) for space in find_head_spaces(flow, model))
    rotated = [one for one in rotations if one is not None]
    found: list[Reordering] = []
    for chain in permutable(flow, model):
        wanted = {patterns[name] for name in chain.consumers if name in patterns}
        if len(wanted) != 1 or chain.channels % (pattern := wanted.pop()).m:
            continue
        chosen = {name for name, one in patterns.items() if one == pattern}
        matrices = importances(model, chain, pattern, chosen)
        result = search_order(matrices, chain.channels, pattern, sweeps=_SWEEPS)
        if result.after > result.before:
            permute(model, chain, result.permutation)  # the producer of one chain can be the consumer of another
            found.append(Reordering(chain, result.permutation, result.before, result.after))
    for one in reversed(found):
        permute(model, one.chain, one.order.argsort())
    return [*rotated, *found]


def pack(reorderings: Sequence[Reordering | Rotation]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and a JSON-able record that `unpack` undoes, bit for bit."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for number, one in enumerate(reorderings):
        fact: dict[str, Any] = {"kept": [one.kept_before, one.kept_after]}
        if isinstance(one, Rotation):
            tensors[f"{number}.matrix"] = one.matrix
            tensors |= {f"{number}.index.{at}": part.index for at, part in enumerate(one.space.parts)}
            fact["parts"] = [[part.layer, part.axis] for part in one.space.parts]
        else:
            tensors[f"{number}.order"] = one.order
            fact["chain"] = asdict(one.chain)
        facts.append(fact)
    return tensors, {"reorderings": facts}


def unpack(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[Reordering | Rotation]:
    """What `pack` was given, also after JSON made lists of the tuples."""
    found: list[Reordering | Rotation] = []
    for number, fact in enumerate(record["reorderings"]):
        if "chain" in fact:
            chain = Chain(
                producer=fact["chain"]["producer"],
                members=tuple(fact["chain"]["members"]),
                consumers=tuple(fact["chain"]["consumers"]),
                channels=fact["chain"]["channels"],
                axes=tuple((name, axis) for name, axis in fact["chain"]["axes"]),
            )
            found.append(Reordering(chain, tensors[f"{number}.order"], *fact["kept"]))
        else:
            first, second = (
                HeadPart(layer, axis, tensors[f"{number}.index.{at}"]) for at, (layer, axis) in enumerate(fact["parts"])
            )
            found.append(Rotation(HeadSpace((first, second)), tensors[f"{number}.matrix"], *fact["kept"]))
    return found


def reorder(model: nn.Module, reorderings: Sequence[Reordering | Rotation]) -> None:
    """Change a model in place: the same for all of one architecture, such as a converted one and its reference."""
    for one in reorderings:
        one.apply(model)
