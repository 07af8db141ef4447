"""The first layer in which a half-precision graph departs from the fp32 graph that it was made from.

A node that is given wrong inputs gives a wrong output and is not to blame. So every node is run twice by itself, on
what its inputs are in fp32: as the half graph has it, which shows what the node adds, and as the fp32 graph has it with
these inputs rounded, which shows whether they may be half at all.

Polygraphy's comparator gives the accumulated differences, as the tests check, of all values at once; it does not run
nodes by themselves, so every node after the culprit looks as guilty. Its `debug precision` bisects builders, on a GPU.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.errors import AccuracyGateFailed, ExportRejected
from tnm_pipeline.export.graph import nodes_of, open_onnx, subgraphs
from tnm_pipeline.export.half_choice import choose
from tnm_pipeline.export.node_errors import HALF, LARGEST, largest_of, relative_error, rounded
from tnm_pipeline.export.node_runs import NodeRuns
from tnm_pipeline.export.precision import emulated
from tnm_pipeline.export.verify import LIMITS, Parity, check, compare

Array = NDArray[Any]

_AT_ONCE = 128  # nodes whose values are in memory together
_WORST = 5
_SCOPE = re.compile(r"'([^'\\]*)'")  # of the list of strings that torch writes with repr


@dataclass(frozen=True)
class NodeError:
    """What one node does to the precision. Errors are relative to its output's largest absolute value in fp32.

    Attributes:
        node: Its name, or that of its first output.
        op: Its operator.
        layer: The torch module that it came from; empty where the file does not say.
        own: What it adds, given its fp32 inputs in half.
        of_inputs: What its inputs alone, rounded to half, do to it in fp32.
        accumulated: By how much its output differs when the whole graph is run.
        largest: The largest absolute value of its output in fp32.
    """

    node: str
    op: str
    layer: str
    own: float
    of_inputs: float
    accumulated: float
    largest: float


@dataclass(frozen=True)
class Departure:
    """Where two graphs part.

    Attributes:
        precision: Of the candidate: `"fp32"`, `"fp16"` or `"bf16"`.
        limit: What the precision allows the outputs, and here each node.
        parity: Of the graphs' outputs.
        passes: Whether the parity is within the limits: then nothing departs.
        first: The first node that adds more than the limit; None if nothing departs, or no single node does so.
        worst: The nodes that add the most, the worst one first.
        keep: Names of the nodes that must stay in fp32: those that are fp32 in the candidate already, though they could
            be half; those that add more than the limit, and where an input may not be half, those that give it: one
            that overflows, or if none does all of them; the worst ones where none adds that much. Empty if nothing
            departs, or nothing is left to keep.
        compared: How many nodes were run by themselves.
        skipped: How many were not, because they hold graphs themselves.
    """

    precision: str
    limit: float
    parity: Parity
    passes: bool
    first: NodeError | None
    worst: tuple[NodeError, ...]
    keep: tuple[str, ...]
    compared: int
    skipped: int


def find_departure(reference: Path, candidate: Path, feeds: Mapping[str, Array]) -> Departure:
    """Find the nodes that a half precision is too little for.

    Half types are emulated, see `precision.emulated`. Every run holds the values of a few dozen nodes, and there are as
    many runs as that takes.

    Args:
        reference: The fp32 graph.
        candidate: What `retype`, or another tool that keeps the nodes' names, made of it.
        feeds: One call's inputs by name.

    Raises:
        ExportRejected: A file is not ONNX, or cannot be run on these inputs; the reference is not fp32; the candidate
            does not state its types.
        AccuracyGateFailed: The two have different outputs.
    """
    original, types = _typed(reference)
    if (found := _precision(types)) != "fp32":
        raise ExportRejected(f"{reference.name} is in {found} itself: give the fp32 file first, then the other")
    exact = NodeRuns(ir.to_proto(original), reference.parent, reference.name)
    retyped, types = _typed(candidate)
    precision = _precision(types)
    if untyped := [key for key, each in types.items() if each.untyped]:
        raise ExportRejected(
            f"{candidate.name} does not say in which type {len(untyped)} of its nodes compute, first {untyped[0]!r}: "
            "add the types with onnx.shape_inference.infer_shapes_path, or let `tnm-pipeline export` write the file"
        )
    half = NodeRuns(emulated(candidate), candidate.parent, candidate.name)
    parity = compare(exact.values(exact.outputs, feeds), half.values(half.outputs, feeds))
    limit, passes = LIMITS[precision].at_most, _passes(parity, precision)

    shared = [key for key in exact.nodes if key in types and (types[key].has_half or precision == "fp32")]
    alike = [key for key in shared if exact.nodes[key].op_type == half.nodes[key].op_type != "Cast"]
    usable = [key for key in alike if not types[key].holds_graphs]
    errors: list[NodeError] = []
    for start in range(0, len(usable), _AT_ONCE):
        errors.extend(_Chunk(exact, half, types, usable[start : start + _AT_ONCE], feeds).errors())
    departing = [] if passes else [error for error in errors if error.own > limit]
    worst = sorted(errors, key=lambda error: -error.own)[:_WORST]
    chosen = _to_keep(exact, errors, departing or [error for error in worst if error.own], limit)
    return Departure(
        precision=precision,
        limit=limit,
        parity=parity,
        passes=passes,
        first=departing[0] if departing else None,
        worst=tuple(worst),
        keep=() if passes or precision == "fp32" else tuple(_with_kept(original, retyped, precision, chosen)),
        compared=len(usable),
        skipped=len(alike) - len(usable),
    )


def _passes(parity: Parity, precision: str) -> bool:
    try:
        check(parity, precision, "")
    except AccuracyGateFailed:
        return False
    return True


class _Types:
    """The types of a node's inputs and outputs, by position."""

    def __init__(self, node: ir.Node) -> None:
        self.inputs = [None if value is None else value.dtype for value in node.inputs]
        self.outputs = [value.dtype for value in node.outputs]
        self.untyped = any(value.dtype is None and value.name for value in node.outputs)
        self.holds_graphs = any(True for _ in subgraphs(node))

    @property
    def all(self) -> list[ir.DataType | None]:
        return [*self.inputs, *self.outputs]

    @property
    def has_half(self) -> bool:
        return any(dtype in HALF for dtype in self.all)


def _typed(path: Path) -> tuple[ir.Model, dict[str, _Types]]:
    model = open_onnx(path)
    return model, {node.name or str(node.outputs[0].name): _Types(node) for node in model.graph}


def _precision(types: Mapping[str, _Types]) -> str:
    return next((name for half, name in HALF.items() if any(half in each.all for each in types.values())), "fp32")


class _Chunk:
    """A few nodes, and all that was computed of them."""

    def __init__(
        self,
        exact: NodeRuns,
        half: NodeRuns,
        types: Mapping[str, _Types],
        keys: Sequence[str],
        feeds: Mapping[str, Array],
    ) -> None:
        self._exact, self._half, self._types, self._keys = exact, half, types, keys
        values = [value for key in keys for value in (*exact.nodes[key].input, *exact.nodes[key].output) if value]
        self._values = exact.values(values, feeds)
        outputs = (value for key in keys for value in half.nodes[key].output if value)
        self._accumulated = half.values(outputs, feeds)
        self._own = half.alone({key: self._rounded_for_half(key) for key in keys})
        self._of_inputs = exact.alone({key: self._rounded_for_exact(key) for key in keys})

    def errors(self) -> Iterator[NodeError]:
        """One for each node, in their order."""
        for key in self._keys:
            node = self._exact.nodes[key]
            names = [
                (value, dtype) for value, dtype in zip(node.output, self._types[key].outputs, strict=True) if value
            ]
            expected = [self._values[value] for value, _ in names]
            own = [rounded(array, dtype) for array, (_, dtype) in zip(self._own[key], names, strict=True)]
            accumulated = [self._accumulated[value] for value in self._half.nodes[key].output if value]
            yield NodeError(
                node=key,
                op=node.op_type,
                layer=_layer(node),
                own=relative_error(expected, own),
                of_inputs=relative_error(expected, self._of_inputs[key]),
                accumulated=relative_error(expected, accumulated),
                largest=max((largest_of(array) for array in expected), default=0.0),
            )

    def _rounded_for_half(self, key: str) -> list[Array | None]:
        """The fp32 inputs in the types that the half graph gives them."""
        there = self._exact.nodes[key].input
        return [
            None if value is None else rounded(self._values[there[position]], self._types[key].inputs[position])
            for position, value in enumerate(self._half.varying(key))
        ]

    def _rounded_for_exact(self, key: str) -> list[Array | None]:
        """The fp32 inputs, still fp32, but rounded where the half graph has them in half."""
        arrays: list[Array | None] = []
        for value, dtype in itertools.zip_longest(self._exact.varying(key), self._types[key].inputs):
            array = None if value is None else self._values[value]
            arrays.append(None if array is None else rounded(array, dtype))
        return arrays


def _layer(node: Any) -> str:
    """The innermost torch module; the last of the scopes is the operation itself."""
    text = next((entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES), "")
    scopes = [scope for scope in _SCOPE.findall(text)[:-1] if scope]
    return scopes[-1] if scopes else ""


def _to_keep(exact: NodeRuns, errors: Sequence[NodeError], guilty: Sequence[NodeError], limit: float) -> set[str]:
    """Keys of the guilty nodes, and of those that give them what may not be half."""
    largest = {error.node: error.largest for error in errors}
    chosen = {error.node for error in guilty}
    for error in guilty:
        if error.of_inputs > limit:
            givers = {exact.producers.get(value, "") for value in exact.varying(error.node) if value} & set(largest)
            chosen |= {key for key in givers if largest[key] > LARGEST} or givers
    return chosen


def _with_kept(original: ir.Model, retyped: ir.Model, precision: str, chosen: Collection[str]) -> list[str]:
    """The chosen nodes and those kept before, in graph order; nodes without a name cannot be kept.

    A node that is fp32 in the candidate was not run, so it would be missing in a list that replaces the one before.
    """
    choice = choose(retyped, next(half for half, name in HALF.items() if name == precision), ())
    could = {node for node, _ in choice.inputs} | {value.producer() for value in choice.outputs}
    kept = {node.name for node in could - set(choice.exact) if node is not None and not _Types(node).has_half}
    named = [node.name for node in nodes_of(original) if node.name]
    wanted = kept.union(chosen)
    return [name for name in named if name in wanted] if wanted.intersection(named) - kept else []
