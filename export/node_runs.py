"""Run an ONNX graph on the CPU node by node: any of its values, and any of its nodes on inputs of one's choice."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tnm_pipeline.export.artifacts import EXTERNAL_ABOVE
from tnm_pipeline.export.cpu_session import open_session, unload, weight_bytes
from tnm_pipeline.export.errors import ExportRejected

Array = NDArray[Any]
_SEVERITY_FATAL = 4


class NodeRuns:
    """A graph whose nodes can be looked into.

    Args:
        model: Without local functions.
        folder: Where its external weights lie.
        name: What a message calls it.
        external_above: Bytes of weights from which on those inside `model` move, in place, to a temporary folder that
            is there as long as this object: protobuf ends at 2 GiB. Then it has no others.

    Attributes:
        nodes: Key -> node, in the order of the graph; those inside If, Loop and Scan are not among them. The key is
            the node's name, or for want of one that of its first output.
        producers: Value -> key of the node that gives it.
    """

    def __init__(
        self, model: onnx.ModelProto, folder: Path, name: str, *, external_above: int = EXTERNAL_ABOVE
    ) -> None:
        if weight_bytes(model) > external_above:
            folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, folder)
            unload(model, folder)
        self._model = model
        self._folder = folder
        self._name = name
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = {node.name or node.output[0]: node for node in model.graph.node}
        self.producers = {value: key for key, node in self.nodes.items() for value in node.output if value}

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [value.name for value in self._model.graph.output]

    def varying(self, key: str) -> list[str | None]:
        """A node's inputs by position: None where it is a weight, or left out."""
        return [value if value and value not in self._weights else None for value in self.nodes[key].input]

    def values(self, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What some of the graph's values are, given its inputs. Nothing is optimised away."""
        wanted = list(dict.fromkeys(names))
        found: dict[str, Array] = {name: feeds[name] for name in wanted if name in feeds}
        found |= {name: self._weight(name) for name in wanted if name in self._weights}
        asked = [name for name in wanted if name not in found]
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
        return found | dict(zip(asked, self._run(model, asked, feeds), strict=True))

    def alone(self, given: Mapping[str, Sequence[Array | None]]) -> dict[str, list[Array]]:
        """What some nodes give for inputs of one's choice, each by itself.

        Args:
            given: Key of a node -> its inputs by position; None where it takes its own weight, or nothing.

        Returns:
            Key -> its outputs, those that have no name left out.
        """
        cut, feeds = [], {}
        for key, arrays in given.items():
            node = NodeProto()
            node.CopyFrom(self.nodes[key])
            for position, array in enumerate(arrays):
                if array is not None:
                    node.input[position] = f"{key} {position}"
                    feeds[node.input[position]] = array
            cut.append(node)
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in feeds.items()
        ]
        outputs = [name for node in cut for name in node.output if name]
        graph = helper.make_graph(
            cut,
            "alone",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [
                self._weights[name]
                for name in sorted({name for node in cut for name in node.input} & set(self._weights))
            ],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        answers: Iterator[Array] = iter(self._run(model, outputs, feeds))
        return {key: [next(answers) for name in self.nodes[key].output if name] for key in given}

    def _weight(self, name: str) -> Array:
        return numpy_helper.to_array(self._weights[name], str(self._folder))

    def _run(self, model: onnx.ModelProto, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Any]:
        if not outputs:
            return []
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY_FATAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        external = any(tensor.data_location == TensorProto.EXTERNAL for tensor in self._weights.values())
        try:
            session = open_session(model, self._folder if external else None, options)
            answers: Sequence[Any] = session.run(list(outputs), dict(feeds))
        except Exception as error:  # ONNX Runtime's classes have no base but this
            raise ExportRejected(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {self._name} node by node on the CPU: {error}. "
                "Give inputs that the model takes, by --inputs"
            ) from error
        return answers
