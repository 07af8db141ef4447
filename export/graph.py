"""An ONNX file of any origin as a graph to walk: checked, functions inlined, weights read only when asked for."""

import graphlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from tnm_pipeline.export.artifacts import read_onnx
from tnm_pipeline.export.errors import ExportRejected

STANDARD = ("", "ai.onnx")  # the names of the domain of ONNX's own operators
_MOST_NODES = 1_000_000  # functions that call functions grow exponentially


def open_onnx(path: Path) -> ir.Model:
    """Open a file that someone else may have written.

    Args:
        path: A file with its weights inside or in the same folder.

    Returns:
        The model without local functions: their bodies stand where they were called. No weight is in memory yet, and
        none was looked at: reading one whose data contradict its shape raises ValueError.

    Raises:
        ExportRejected: The file is missing, is not ONNX, or cannot be walked.
    """
    proto = read_onnx(path)
    sparse = [tensor.values.name for graph in _graphs(proto.graph) for tensor in graph.sparse_initializer]
    if sparse:
        raise ExportRejected(
            f"{path.name} stores {len(sparse)} weights as SparseTensorProto, first {sparse[0]!r}: TensorRT reads dense "
            "ones, zeros included. Write them as ordinary initializers"
        )
    try:
        model = ir.from_proto(proto)
        if model.functions:
            _check_expansion(model)
            InlinePass()(model)
        for graph in model.graphs():
            ir.external_data.set_base_dir(graph, path.parent.resolve())
    except Exception as error:  # on graphs that the checker let through it fails in a dozen unrelated ways
        raise ExportRejected(
            f"{path.name} is no graph that can be walked: {innermost(error)}. Write it again with the tool it came from"
        ) from error
    return model


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Every node in graph order, those of subgraphs after the node that holds them."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def title(node: ir.Node) -> str:
    """What a message calls a node: its name, or for want of one its first output."""
    name = node.name or next((value.name for value in node.outputs if value.name), "")
    operator = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
    return f"{operator} node {name!r}"


def innermost(error: BaseException) -> BaseException:
    """The cause that says something: the reader wraps it once for every level of the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _check_expansion(model: ir.Model) -> None:
    """Refuse functions that call themselves, or that grow beyond all bounds, before anything is inlined."""
    calls = {
        name: [node.op_identifier() for node in function.all_nodes()] for name, function in model.functions.items()
    }
    own = {name: [callee for callee in callees if callee in calls] for name, callees in calls.items()}
    sizes: dict[ir.OperatorIdentifier, int] = {}
    try:
        for name in graphlib.TopologicalSorter(own).static_order():
            sizes[name] = sum(sizes.get(callee, 1) for callee in calls[name])
    except graphlib.CycleError as error:
        raise ValueError(f"its functions call each other in a circle, through {error.args[1][0]}") from None
    total = sum(sizes.get(node.op_identifier(), 1) for node in nodes_of(model))
    if total > _MOST_NODES:
        raise ValueError(f"its functions expand to {total} nodes, and {_MOST_NODES} is the most")
