"""The first layer in which a half-precision graph departs from the fp32 graph that it was made from.

A node that is given wrong inputs gives a wrong output and is not to blame. So every node is run twice by itself, on
what its inputs are in fp32: as the half graph has it, which shows what the node adds, and as the fp32 graph has it with
these inputs rounded, which shows whether they may be half at all.

Polygraphy's comparator gives the accumulated differences, as the tests check, of all values at once; it does not run
nodes by themselves, so every node after the culprit looks as guilty. Its `debug precision` bisects builders, on a GPU.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.errors import AccuracyGateFailed, ExportRejected
from tnm_pipeline.export.graph import open_onnx, subgraphs
from tnm_pipeline.export.node_runs import NodeRuns
from tnm_pipeline.export.precision import emulated
from tnm_pipeline.export.verify import LIMITS, Parity, check, compare

Array = NDArray[Any]

_AT_ONCE = 128  # nodes whose values are in memory together
_WORST = 5
_LARGEST = 65504.0  # of fp16
_HIDDEN = -6e4  # what a mask is in fp16: its lowest number, plus a score
_MASKED = -1e6  # "hidden from the softmax", see half_values
_HALF = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
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
        keep: Names of the nodes that must stay in fp32: those that add more than the limit, and where an input may not
            be half, those that give it: one that overflows, or if none does all of them.
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
    _, types = _typed(candidate)
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
    return Departure(
        precision=precision,
        limit=limit,
        parity=parity,
        passes=passes,
        first=departing[0] if departing else None,
        worst=tuple(sorted(errors, key=lambda error: -error.own)[:_WORST]),
        keep=tuple(_to_keep(exact, errors, departing, limit)),
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
        return any(dtype in _HALF for dtype in self.all)


def _typed(path: Path) -> tuple[ir.Model, dict[str, _Types]]:
    model = open_onnx(path)
    return model, {node.name or str(node.outputs[0].name): _Types(node) for node in model.graph}


def _precision(types: Mapping[str, _Types]) -> str:
    return next((name for half, name in _HALF.items() if any(half in each.all for each in types.values())), "fp32")


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
            own = [_round(array, dtype) for array, (_, dtype) in zip(self._own[key], names, strict=True)]
            accumulated = [self._accumulated[value] for value in self._half.nodes[key].output if value]
            yield NodeError(
                node=key,
                op=node.op_type,
                layer=_layer(node),
                own=_error(expected, own),
                of_inputs=_error(expected, self._of_inputs[key]),
                accumulated=_error(expected, accumulated),
                largest=max((_absmax(array) for array in expected), default=0.0),
            )

    def _rounded_for_half(self, key: str) -> list[Array | None]:
        """The fp32 inputs in the types that the half graph gives them."""
        there = self._exact.nodes[key].input
        return [
            None if value is None else _round(self._values[there[position]], self._types[key].inputs[position])
            for position, value in enumerate(self._half.varying(key))
        ]

    def _rounded_for_exact(self, key: str) -> list[Array | None]:
        """The fp32 inputs, still fp32, but rounded where the half graph has them in half."""
        rounded: list[Array | None] = []
        for value, dtype in itertools.zip_longest(self._exact.varying(key), self._types[key].inputs):
            array = None if value is None else self._values[value]
            rounded.append(None if array is None else _round(array, dtype))
        return rounded


def _round(array: Array, dtype: ir.DataType | None) -> Array:
    """To a half type, if it is one, and back."""
    if dtype is None or dtype not in _HALF or array.dtype.kind != "f":
        return array
    if dtype == ir.DataType.FLOAT16:
        array = np.where(_hides(array), -_LARGEST, array)
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy()).astype(np.float32)


def _error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """The largest difference over the largest absolute value, of the output where that is worst."""
    worst = 0.0
    for wanted, given in zip(expected, actual, strict=True):
        if wanted.dtype.kind != "f" or not wanted.size:
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(wanted.astype(np.float64) - given.astype(np.float64))
        same = (wanted == given) | (np.isnan(wanted) & np.isnan(given)) | (_hides(wanted) & (given < _HIDDEN))
        difference[same] = 0.0
        far, absmax = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()), _absmax(wanted)
        if far:
            worst = max(worst, far / absmax if absmax else np.inf)
    return worst


def _absmax(array: Array) -> float:
    if array.dtype.kind != "f":
        return 0.0
    counted = np.abs(array[np.isfinite(array) & ~_hides(array)])
    return float(counted.max()) if counted.size else 0.0


def _hides(array: Array) -> NDArray[np.bool_]:
    """Where one number far below all others hides something from a softmax: half types need not hold it."""
    low = np.isfinite(array) & (array < _MASKED)
    numbers = array[low].astype(np.float64)
    one = bool(numbers.size) and float(numbers.max() - numbers.min()) <= 0.01 * float(-numbers.min())
    return low if one else np.zeros_like(low)


def _layer(node: Any) -> str:
    """The innermost torch module; the last of the scopes is the operation itself."""
    text = next((entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES), "")
    scopes = [scope for scope in _SCOPE.findall(text)[:-1] if scope]
    return scopes[-1] if scopes else ""


def _to_keep(exact: NodeRuns, errors: Sequence[NodeError], departing: Sequence[NodeError], limit: float) -> list[str]:
    """In graph order; nodes without a name cannot be kept."""
    largest = {error.node: error.largest for error in errors}
    chosen = {error.node for error in departing}
    for error in departing:
        if error.of_inputs > limit:
            givers = {exact.producers.get(value, "") for value in exact.varying(error.node) if value} & set(largest)
            chosen |= {key for key in givers if largest[key] > _LARGEST} or givers
    return [key for key, node in exact.nodes.items() if key in chosen and node.name]
