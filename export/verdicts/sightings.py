"""What was seen of each node while a plan was built: in the builder's log, and by the engine inspector."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.export.verdicts.builder_names import BuilderNames

if TYPE_CHECKING:
    from tnm_pipeline.export.tensorrt import BuildReport

_SPARSE_TACTICS = ("sparse", "spgemm", "sptensorop")  # parts of their names: TensorRT's own, and CUTLASS's
_REGION = re.compile(r"ForeignNode (\{ForeignNode\[.*\]\}) metadata: (.+)")


@dataclass(frozen=True)
class PlanFacts:
    """What is known about a plan.

    Attributes:
        manifest: The plan's.
        eligible_layers: As in `BuildReport`, like all that follows; None where nobody said.
        picked_layers: Layers with a sparse tactic.
        eligible_names: The builder's names of them.
        picked_names: The builder's names of them.
        inspector: Layers of the engine inspector.
        regions: Compiled regions: their names, and what the log says went into them.
    """

    manifest: Manifest
    eligible_layers: int | None = None
    picked_layers: int | None = None
    eligible_names: Sequence[str] | None = None
    picked_names: Sequence[str] | None = None
    inspector: Sequence[Mapping[str, Any]] | None = None
    regions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, build: "BuildReport") -> "PlanFacts":
        """What a build that was just made has shown."""
        found = (_REGION.search(text) for _, text in build.log.messages)
        return cls(
            manifest=build.manifest,
            eligible_layers=build.eligible_layers,
            picked_layers=build.picked_layers,
            eligible_names=build.eligible_names,
            picked_names=build.picked_names,
            inspector=build.inspector,
            regions={region[1]: region[2] for region in found if region is not None},
        )

    @property
    def silent(self) -> bool:
        """Whether nobody named a layer; a count alone says nothing about any of them."""
        return self.eligible_names is None and self.picked_names is None and not self.inspector


@dataclass(frozen=True)
class Sighting:
    """What was seen of one node.

    Attributes:
        names: The builder's names that stand for it.
        eligible: Whether the builder called it eligible; None where that cannot be told.
        picked: Whether it has a sparse tactic; None where that cannot be told.
        tactic: The tactic that the inspector names; None without one.
        region: The compiled region that it went into, if that was said.
    """

    names: tuple[str, ...]
    eligible: bool | None
    picked: bool | None
    tactic: str | None
    region: str | None


class Sightings:
    """All that was seen in one plan."""

    def __init__(self, plan: PlanFacts, names: BuilderNames, weighted: Collection[str]) -> None:
        """Match everything.

        Args:
            plan: What is known.
            names: Of the graph that it was built from.
            weighted: The nodes with weights.
        """
        self._eligible = _Listed(plan.eligible_names, plan.eligible_layers, names, weighted)
        self._picked = _Listed(plan.picked_names, plan.picked_layers, names, weighted)
        self._entries: dict[str, list[Mapping[str, Any]]] = {}
        regions = [{"Name": name, "Metadata": metadata} for name, metadata in plan.regions.items()]
        for entry in (*(plan.inspector or ()), *regions):
            meaning = names.read_entry(entry)
            for node in meaning.nodes:
                self._entries.setdefault(node, []).append({**entry, "region": meaning.region})
        self.unmapped = tuple(dict.fromkeys((*self._eligible.lost, *self._picked.lost)))

    def of(self, node: str) -> Sighting:
        """What was seen of a node, by the name that the parser gives it."""
        entries = self._entries.get(node, [])
        tactics = [str(entry["TacticName"]) for entry in entries if entry.get("TacticName") and not entry["region"]]
        tactic = next(filter(_is_sparse, tactics), next(iter(tactics), None))
        inspected = None if tactic is None else _is_sparse(tactic)
        logged = self._picked.holds(node)
        names = (*self._eligible.names(node), *self._picked.names(node), *map(_name, entries))
        region = next((_name(entry) for entry in entries if entry["region"]), None)
        return Sighting(
            names=tuple(dict.fromkeys(names)),
            eligible=self._eligible.holds(node),
            picked=True if logged or inspected else inspected if logged is None else logged,
            tactic=tactic,
            region=region,
        )


class _Listed:
    """A list of names in the log."""

    def __init__(
        self, listed: Iterable[str] | None, count: int | None, names: BuilderNames, weighted: Collection[str]
    ) -> None:
        self._names: dict[str, list[str]] = {}
        self.lost: list[str] = []
        for name in listed or ():
            meaning = names.read(name)
            for node in meaning.nodes:
                self._names.setdefault(node, []).append(name)
            if not meaning.nodes.intersection(weighted):
                self.lost.append(name)
        # A name that was not understood may stand for any node.
        self._complete = count == 0 or (listed is not None and not self.lost)

    def holds(self, node: str) -> bool | None:
        """Whether a node is in the list; None where the list does not tell."""
        return True if node in self._names else False if self._complete else None

    def names(self, node: str) -> list[str]:
        """The names under which it is."""
        return self._names.get(node, [])


def _is_sparse(tactic: str) -> bool:
    return any(part in tactic.lower() for part in _SPARSE_TACTICS)


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("Name", ""))
