"""Which nodes of an ONNX graph a name stands for that a TensorRT builder writes.

The forms below were seen in logs, in engine inspectors and in networks that the parser made:

    conv1                                one node
    node_of_y                            a node without a name, by its first output
    conv1_0                              one of several layers that a node became, or a name that two nodes have
    conv1 + add1 + relu1                 nodes fused one after the other
    conv1 || conv2                       nodes side by side, joined
    /a/MatMul+/b/MatMul_myl0_9           a piece of a compiled region; dots in names became underscores
    {ForeignNode[first...last]}          a whole region: what lies between is not said
    [ONNX Layer: a] <RS> [ONNX Layer: b] the inspector's `Metadata`, with the ASCII record separator
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_REGION = re.compile(r"\{ForeignNode\[.*\]\}")
_PIECE = re.compile(r"_myl\d+_\d+$")
_COPY = re.compile(r"_\d+$")
_METADATA = re.compile(r"\[ONNX Layer: (.+?)\](?=\x1e|\[ONNX Layer: |$)")
_JOINED = re.compile(r" \+ | \|\| ")


def node_name(name: str, output: str) -> str:
    """What TensorRT's parser calls a node: by its name, or for want of one by its first output."""
    return name or f"node_of_{output}"


@dataclass(frozen=True)
class Meaning:
    """What a builder's name stands for.

    Attributes:
        nodes: Nodes of the graph.
        region: Whether it is a region whose inside is not listed.
    """

    nodes: frozenset[str]
    region: bool = False


class BuilderNames:
    """Reads a builder's names against the nodes of one graph."""

    def __init__(self, nodes: Iterable[str]) -> None:
        """Take the nodes' names, as `node_name` gives them."""
        self._nodes = frozenset(nodes)
        self._dotless = {name.replace(".", "_"): name for name in self._nodes}

    def read(self, name: str) -> Meaning:
        """Read a name of the log.

        Args:
            name: In one of the module's forms.

        Returns:
            The nodes that it names; none where it names nothing of this graph.
        """
        if _REGION.fullmatch(name):
            return Meaning(frozenset(), region=True)
        piece = _PIECE.sub("", name)
        parts = piece.split("+") if piece != name else _JOINED.split(name)
        return Meaning(frozenset(node for part in parts if (node := self._node(part.strip())) is not None))

    def read_entry(self, entry: Mapping[str, object]) -> Meaning:
        """Read a layer of the engine inspector: by its metadata if it has any, or else by its name."""
        name = str(entry.get("Name", ""))
        listed = _METADATA.findall(str(entry.get("Metadata", "")))
        region = _REGION.fullmatch(name) is not None
        return Meaning(self._nodes.intersection(listed), region) if listed else self.read(name)

    def _node(self, part: str) -> str | None:
        for name in (part, _COPY.sub("", part)):
            if name in self._nodes:
                return name
            if name in self._dotless:
                return self._dotless[name]
        return None
