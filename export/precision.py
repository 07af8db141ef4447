"""A float32 ONNX graph to a typed half one: strongly typed builders take the precision from the graph alone."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

from tnm_pipeline.export.artifacts import publish_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.graph import STANDARD, innermost, nodes_of, open_onnx, title
from tnm_pipeline.export.half_choice import choose, is_float32
from tnm_pipeline.export.half_values import short, to_half, unmasked

Half = Literal["fp16", "bf16"]
OPSET_OF: Mapping[Half, int] = {"fp16": 1, "bf16": 22}  # from which on Conv and the poolings take the type
_HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def retype(source: Path, target: Path, precision: Half, *, keep: Collection[str] = ()) -> None:
    """Convert weights and compute of a graph to a half type; its inputs and outputs stay float32.

    What ONNX does not allow in the type at the graph's opset stays float32 between casts, and so do the bodies'
    inputs and outputs of If, Loop and Scan, operators for which half makes no sense (`TopK`, `CumSum`, `Range`, ...),
    and positions and masks until they meet a half value. Zeros stay zeros, so N:M survives; other values never become
    zero. Infinities stay what they are; see `half_values` for large negative ones. Local functions are inlined, and
    initializers that were also inputs of the graph are constants.

    Args:
        source: A float32 ONNX file. Batch norms are best folded before.
        target: The file to write; its folder exists.
        precision: `"fp16"`, or `"bf16"`, which asks for opset 22.
        keep: Names of nodes that stay in float32.

    Raises:
        ExportRejected: `source` is not ONNX or cannot be converted, a constant is beyond the type's range, `keep`
            names no node, or the result fails the gate of `publish_onnx`.
        OSError: The folder is missing, read-only or full.
    """
    model = open_onnx(source)
    _check(model, source, precision, keep)
    with _refusing(source, f"be converted to {precision}"):
        _prepare(model)
        _Retyping(model, _HALF[precision], keep).run()
        ir.external_data.load_to_model(model)  # what stays as it was may lie beside the source
        publish_onnx(model, target, run=precision == "fp16")


@contextmanager
def _refusing(source: Path, what: str) -> Iterator[None]:
    """A graph that contradicts itself fails in numpy and in the graph library, in many ways."""
    try:
        yield
    except (ExportRejected, OSError):
        raise
    except Exception as error:
        raise ExportRejected(
            f"{source.name} cannot {what}: {type(error).__name__}: {innermost(error)}. "
            "Write it again with the tool it came from, or keep it in fp32"
        ) from error


def _check(model: ir.Model, source: Path, precision: Half, keep: Collection[str]) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    if opset < OPSET_OF[precision]:
        raise ExportRejected(
            f"{source.name} is of opset {opset}, and convolutions take {precision} from {OPSET_OF[precision]} on: "
            f"export with opset = {OPSET_OF[precision]}, or choose fp16"
        )
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise ExportRejected(
            f"{source.name} is of opset {opset}, and the installed onnx knows them up to {newest}: update it, or "
            "export with an older opset"
        )
    names = [node.name for node in nodes_of(model) if node.name]
    for unknown in sorted(set(keep) - set(names)):
        near = ", ".join(difflib.get_close_matches(unknown, names)) or "nothing like it"
        raise ExportRejected(f"no node of {source.name} is called {unknown!r}; there is {near}")


def _prepare(model: ir.Model) -> None:
    """Constants become initializers, no initializer is an input, and every value gets the type that can be inferred."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version or 0, 4)  # before, every initializer had to be an input
    if not any(domain in STANDARD for domain in model.opset_imports):
        model.opset_imports[""] = 13  # for the casts
    if any(value.type is None for graph in model.graphs() for value in _made(graph)):
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
        for graph, known in zip(model.graphs(), inferred.graphs(), strict=True):
            for value, same in zip(_made(graph), _made(known), strict=True):
                value.type = same.type if value.type is None else value.type


def _made(graph: ir.Graph) -> list[ir.Value]:
    """What a graph is given and what its nodes make."""
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


class _Retyping:
    """One conversion, in place."""

    def __init__(self, model: ir.Model, half: ir.DataType, keep: Collection[str]) -> None:
        self._model = model
        self._half = half
        self._choice = choose(model, half, keep)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._taken = _names(model)

    def run(self) -> None:
        """Constants first, then what nodes give, then casts where a node is given something else than it takes."""
        graphs, nodes = list(self._model.graphs()), list(nodes_of(self._model))
        takers = [
            (node, index, value)
            for node in nodes
            for index, value in enumerate(node.inputs)
            if value is not None and is_float32(value) and value.const_value is None and node.op_type != "Cast"
        ]
        for graph in graphs:
            for value in [value for value in graph.initializers.values() if is_float32(value)]:
                self._retype_constant(graph, value)
        for node in nodes:
            self._retype_outputs(node)
        for node, index, value in takers:
            wanted = self._half if (node, index) in self._choice.inputs else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._cast(value, wanted))
        for graph in graphs:
            self._restore_outputs(graph)
        for node in nodes:
            _drop_if_idle(node)

    def _retype_constant(self, graph: ir.Graph, value: ir.Value) -> None:
        """An initializer becomes half or stays float32, or is there twice if it is used in both ways."""
        assert value.const_value is not None  # it is an initializer
        plain = unmasked(value.const_value.numpy(), self._half)
        uses = [(use.node, use.idx) for use in value.uses()]
        halves = [use for use in uses if use in self._choice.inputs]
        others = [use for use in uses if use not in self._choice.inputs]
        if not halves:
            value.const_value = ir.tensor(plain, name=value.name)
            return
        users = ", ".join(repr(node.name) for node, _ in halves[:3])
        advice = f"keep its nodes in float32 (keep = {users}), rescale that layer, or keep the model in fp32"
        rounded = to_half(plain, self._half, f"initializer {value.name!r}", advice)
        if value.is_graph_output():
            _hand(halves, self._constant(graph, value, rounded, self._half))
            return
        if others:
            _hand(others, self._constant(graph, value, plain, ir.DataType.FLOAT))
        value.const_value = ir.tensor(rounded, dtype=self._half, name=value.name)
        value.dtype = self._half

    def _constant(self, graph: ir.Graph, like: ir.Value, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        name = self._name(like, dtype)
        value = ir.Value(name=name, shape=like.shape, type=ir.TensorType(dtype))
        value.const_value = ir.tensor(array, dtype=dtype, name=name)
        graph.register_initializer(value)
        return value

    def _retype_outputs(self, node: ir.Node) -> None:
        for value in node.outputs:
            if value in self._choice.outputs:
                value.dtype = self._half
                if node.op_type == "Cast":
                    node.attributes["to"] = ir.AttrInt64("to", self._half)
                elif node.op_type == "ConstantOfShape":
                    node.attributes["value"] = ir.AttrTensor("value", self._filling(node))

    def _filling(self, node: ir.Node) -> ir.TensorProtocol:
        given = node.attributes.get_tensor("value")
        plain = unmasked(np.zeros(1, np.float32) if given is None else given.numpy(), self._half)
        advice = f"keep that node in float32 (keep = {node.name!r})"
        return ir.tensor(to_half(plain, self._half, title(node), advice), dtype=self._half)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another type, cast once for all who want it, right where it is made."""
        if (value, dtype) not in self._casts:
            cast = _cast_node(value, self._name(value, dtype), dtype)
            producer, graph = value.producer(), value.graph
            assert graph is not None  # only values of the model's graphs are given to nodes
            if producer is not None:
                graph.insert_after(producer, cast)
            else:
                graph.insert_before(graph[0], cast)
            self._casts[value, dtype] = cast.outputs[0]
        return self._casts[value, dtype]

    def _restore_outputs(self, graph: ir.Graph) -> None:
        """A graph gives out float32 under the old name, whatever it is made of."""
        for index, value in enumerate(graph.outputs):
            if value.dtype == self._half and value in self._choice.outputs:
                name, value.name = value.name, self._name(value, self._half)
                assert name is not None  # an output of a graph has one
                cast = _cast_node(value, name, ir.DataType.FLOAT)
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]

    def _name(self, value: ir.Value, dtype: ir.DataType) -> str:
        return _fresh(f"{value.name}_{short(dtype)}", self._taken)


def _hand(uses: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)


def _drop_if_idle(node: ir.Node) -> None:
    """Remove a Cast of a value to the type that it has by now."""
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype != node.outputs[0].dtype:
        return
    if not node.outputs[0].is_graph_output() and node.graph is not None:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        node.graph.remove(node, safe=True)


def emulated(source: Path) -> onnx.ModelProto:
    """A half graph for a CPU: every node computes in float32 and rounds what it gives to its half type.

    That is what a GPU computes, up to the order in which it sums and to the steps inside an operator that it rounds
    as well. ONNX Runtime's CPU has no bf16 at all, and of an fp16 graph it computes parts in float32 without rounding
    between them: asked directly, it makes fp16 look more accurate than it is. This proves the accuracy of the type, not
    of any engine: report it as emulated.

    Args:
        source: What `retype` wrote.

    Returns:
        The same inputs and outputs; every weight a float32 that the half type holds exactly.

    Raises:
        ExportRejected: The file is missing or not ONNX, or its own inputs or outputs are half.
    """
    model = open_onnx(source)
    outside = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in _HALF.values()]
    if outside:
        raise ExportRejected(
            f"{source.name} is given or gives {outside[0]!r} in half: emulated are graphs with float32 inputs and "
            "outputs, as `tnm-pipeline export` writes them"
        )
    with _refusing(source, "be emulated"):
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.dtype in _HALF.values() and value.const_value is not None:
                    value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                    value.dtype = ir.DataType.FLOAT
        taken = _names(model)
        for node in list(nodes_of(model)):
            for value in node.outputs:
                if value.dtype in _HALF.values():
                    _round(node, value, taken)
        proto = ir.to_proto(ir.external_data.load_to_model(model))
    return proto  # noqa: RET504 # inside the block, a type checker would miss it for a block that may swallow errors


def _round(node: ir.Node, value: ir.Value, taken: set[str]) -> None:
    """Make a node give float32, with a cast to its half type and back after it."""
    if node.op_type == "ConstantOfShape":
        filling = node.attributes["value"].as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(filling))
    half = value.dtype
    assert half is not None  # one of the half types
    users = [(use.node, use.idx) for use in value.uses()]
    steps: list[ir.Node] = []
    if node.op_type != "Cast":  # which rounds by itself
        value.dtype = ir.DataType.FLOAT
        steps.append(_cast_node(value, _fresh(f"{value.name}_rounded", taken), half))
    rounded = steps[-1].outputs[0] if steps else value
    steps.append(_cast_node(rounded, _fresh(f"{value.name}_widened", taken), ir.DataType.FLOAT))
    assert node.graph is not None  # a node of the model
    node.graph.insert_after(node, steps)
    _hand(users, steps[-1].outputs[0])


def _cast_node(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[result], name=f"cast_{name}")


def _names(model: ir.Model) -> set[str]:
    """Of all values."""
    values = (value for graph in model.graphs() for value in (*graph.initializers.values(), *_made(graph)))
    return {value.name for value in values if value.name}


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
