"""A failed build told to a person: which node, which torch module, in the builder's words, and the way out."""

import ast
import re
from collections.abc import Mapping, Sequence

import onnx

from tnm_pipeline.export.artifacts import NAME_SCOPES
from tnm_pipeline.export.building.request import Complaint

_SHOWN = 5
_OTHER_WAYS = "or run the ONNX file with ONNX Runtime instead of a plan"

# What a builder's log looks like -> what to do about it. The texts are those of TensorRT 10, 11 and TensorRT-RTX.
_WAYS_OUT = {
    r"violates? shape constraints|reshape would change volume|dimensions not compatible|Condition '\S+' violated": (
        "The graph computes with a fixed size where a profile lets it vary: the export took a size of the sample data "
        "for a constant. Export again with that dimension dynamic all through the model (no `int(x.shape[0])`, no "
        "reshape to literal sizes), or set min = opt = max of that dimension to the fixed size"
    ),
    r"Attention operation was not supported": (
        "This builder has no kernel for the operator Attention with these types and shapes, which opsets from 23 on "
        "emit: export with opset 20 to 22, where attention is spelled out in products and a softmax"
    ),
    r"within workspace limit|insufficient workspace": (
        "No tactic fits into the workspace: raise workspace_mib, or leave it out"
    ),
    r"libnvinfer_lean|[Vv]ersion.compatib": (
        "This builder's package lacks the lean runtime that version_compatible needs: leave it out"
    ),
    r"UnicodeDecodeError": "A name in the graph is not UTF-8: write the file again with the tool it came from",
    r"Cannot compile (operation|for target)": (
        "A GPU of that compute capability cannot do this in this precision: leave it out of compute_capabilities, or "
        "build a plan of its own for it in another precision"
    ),
}


def way_out(text: str) -> str:
    """What to do about a builder's complaint; empty where only the complaint itself can tell."""
    return next((advice for pattern, advice in _WAYS_OUT.items() if re.search(pattern, text)), "")


def describe_complaints(complaints: Sequence[Complaint], graph: onnx.GraphProto) -> str:
    """The first complaints of a parser, each with its node, its torch module and the way out.

    Args:
        complaints: In the parser's order.
        graph: What was parsed.
    """
    nodes = {node.name: node for node in graph.node}
    lines = [_describe(complaint, nodes) for complaint in complaints[:_SHOWN]]
    more = len(complaints) - len(lines)
    return "\n".join(lines + [f"and {more} more"] * (more > 0))


def modules_in(text: str, graph: onnx.GraphProto) -> str:
    """The torch modules of the nodes that a builder's log names, one per line; empty where it names none.

    Args:
        text: Lines of the log.
        graph: What was built.
    """
    words = {word.rstrip(".:,") for word in re.findall(r"[\w./:-]+", text)}
    operators = set(re.findall(r"(\w+) operation", text))
    named = [node for node in graph.node if node.name in words or node.op_type in operators]
    return "\n".join(f"node {node.name} ({node.op_type}){_module(node)}" for node in named[:_SHOWN])


def _describe(complaint: Complaint, nodes: Mapping[str, onnx.NodeProto]) -> str:
    if not complaint.operator:
        return (
            f"{complaint.text}. It is about an input, output or weight of the graph: use floating-point types of at "
            "most 32 bits, integers or booleans there"
        )
    node = nodes.get(complaint.node)  # None in the body of an If, a Loop or a function
    where = f"node {complaint.node or 'without a name'} ({complaint.operator}){'' if node is None else _module(node)}"
    if node is not None and node.domain not in ("", "ai.onnx"):
        return (
            f"{where}: the operator comes from the domain {node.domain!r}, and no plugin for it is loaded. Write that "
            f"part of the model with operators of torch that export to standard ONNX, {_OTHER_WAYS}"
        )
    if complaint.code == "UNSUPPORTED_NODE" or "Plugin not found" in complaint.text:
        detail = "" if complaint.text == "false" else f" ({complaint.text})"
        return (
            f"{where}: the builder does not support the operator like this{detail}. Write that part of the model "
            f"without it, {_OTHER_WAYS}"
        )
    return f"{where}: {complaint.text} ({complaint.code}). Change that part of the model, {_OTHER_WAYS}"


def _module(node: onnx.NodeProto) -> str:
    """`", in torch module encoder.layer.0"`, or nothing in a file that torch's exporter did not annotate."""
    text = next((prop.value for prop in node.metadata_props if prop.key == NAME_SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # anybody may write anything there
        return ""
    modules = [scope for scope in scopes[:-1] if isinstance(scope, str) and scope] if isinstance(scopes, list) else []
    return f", in torch module {modules[-1]}" if modules else ""
