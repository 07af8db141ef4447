"""What a building process is asked and what it answers: plain data that travels as JSON."""

from dataclasses import dataclass
from typing import Any

from tnm_pipeline.export.errors import BuildFailed

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input name -> its (min, opt, max) shapes in one optimisation profile."""


@dataclass(frozen=True)
class BuildRequest:
    """One plan to build.

    Attributes:
        builder: The module to build with: `"tensorrt"` or `"tensorrt_rtx"`.
        onnx: Path of the graph.
        plan: Path to write the plan to; the asker publishes it under its final name.
        sparse: Allow sparse tactics.
        precision: What convolutions and matrix products must compute in: `"fp32"`, `"fp16"` or `"bf16"`.
        keep_fp32: Names of nodes that may compute in fp32 all the same.
        profiles: The shapes of each optimisation profile; none for a graph of fixed sizes.
        compute_capabilities: GPUs to build for (`"8.9"`), for a builder that needs none here.
        workspace_mib: Most scratch memory of a tactic, in MiB; None leaves it to the builder.
        timing_cache: Path of a timing cache to read and keep; it need not exist. None keeps none.
        version_compatible: The plan shall run with later releases too.
        hardware_compatible: `"ampere_plus"`, `"same_compute_capability"` or None: other GPUs that it shall run on.
        detailed: Keep in the plan what the engine inspector tells of each layer.
        inspect: Load the plan and ask the engine inspector. Only with a driver: without one the runtime crashes.
    """

    builder: str
    onnx: str
    plan: str
    sparse: bool
    precision: str
    keep_fp32: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    compute_capabilities: tuple[str, ...]
    workspace_mib: int | None
    timing_cache: str | None
    version_compatible: bool
    hardware_compatible: str | None
    detailed: bool
    inspect: bool


@dataclass(frozen=True)
class Built:
    """What a finished build adds to the plan.

    Attributes:
        timing_cache_used: Whether a timing cache was read and kept; None where none was asked for.
        inspector: One object per layer from the engine inspector; None where it was not asked or could not answer.
        notes: What was asked for and left aside or not done, each with the reason.
    """

    timing_cache_used: bool | None
    inspector: list[dict[str, Any]] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Complaint:
    """What a parser has against one node.

    Attributes:
        node: The node's name, empty where it has none or the complaint is not about a node.
        operator: Its operator, empty likewise.
        code: The parser's error code (`"UNSUPPORTED_NODE"`).
        text: The failed condition, in the parser's words.
    """

    node: str
    operator: str
    code: str
    text: str


class ParseRefused(BuildFailed):
    """A parser gave up, node by node."""

    def __init__(self, complaints: list[Complaint]) -> None:
        super().__init__("the parser refuses the graph")
        self.complaints = complaints
