"""What came of a building process: what was built, or one exception that tells a person why not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.export.building.log import BuildLog, short_of_memory
from tnm_pipeline.export.building.process import Ending
from tnm_pipeline.export.building.progress import BuildProgress, Phases
from tnm_pipeline.export.building.request import BuildRequest, Built, Complaint
from tnm_pipeline.export.errors import BuildFailed, BuildOutOfMemory, ExportRejected

if TYPE_CHECKING:  # heavy: imported when there is something to explain
    import onnx

_LESS = (
    "Free some memory, or ask for less: fewer compute capabilities or profiles in one plan, smaller largest sizes, a "
    "smaller workspace_mib"
)


@dataclass
class Hearing:
    """What a building process has said so far.

    Attributes:
        on_progress: Told of every step that is done, and every second, if anybody wants to know.
        log: The builder's.
        version: Of the builder's package; None until it was imported.
        answer: Kind and content of the last event: `"done"`, or what went wrong. None until then.
    """

    on_progress: Callable[[BuildProgress], None] | None
    log: BuildLog = field(default_factory=BuildLog)
    version: str | None = None
    answer: tuple[str, Any] | None = None
    _phases: Phases = field(default_factory=Phases)

    def hear(self, kind: str, values: list[Any]) -> None:
        """Take one event; what `on_progress` raises comes out."""
        match kind:
            case "log":
                self.log.add(*values)
            case "start":
                self._phases.start(*values)
            case "step" | "tick":
                step = self._phases.step(*values) if kind == "step" else self._phases.tick()
                if self.on_progress is not None:
                    self.on_progress(step)
            case "finish":
                self._phases.finish(*values)
            case "version":
                (self.version,) = values
            case _:
                self.answer = (kind, values[0])


def built(
    hearing: Hearing, ending: Ending, request: BuildRequest, graph: "onnx.GraphProto", targets: Sequence[str]
) -> Built:
    """What was built.

    Args:
        hearing: All that the process said.
        ending: How it ended.
        request: What it was asked.
        graph: What it read.
        targets: The GPUs' compute capabilities, for the message.

    Raises:
        EnvironmentLacks: This builder cannot do what was asked.
        ExportRejected: The graph is not what a plan can be built from.
        OSError: The plan or the timing cache could not be written.
        BuildOutOfMemory: Memory ran out.
        BuildFailed: Everything else, a crash, a kill and the time limit included.
    """
    kind, content = hearing.answer or ("", {})
    if kind == "done":
        return Built(**content)
    if kind == "lacking":
        raise EnvironmentLacks(content)
    if kind == "rejected":
        raise ExportRejected(content)
    if kind == "unwritable":
        raise OSError(*content)
    name = Path(request.onnx).name
    builder = f"{request.builder} {hearing.version or ''}".strip()
    failed = f"{builder} could not build {name} for {', '.join(targets)}"
    if ending.timed_out:
        raise BuildFailed(_timed_out(failed, hearing))
    if ending.out_of_memory or short_of_memory(hearing.log, ending.said):
        killed = " and the kernel killed its process" if ending.out_of_memory else ""
        raise BuildOutOfMemory(f"{failed}: memory ran out{killed}.\n{_last_words(hearing, ending)}\n{_LESS}")
    from tnm_pipeline.export.building.complaints import describe_complaints, modules_in, way_out

    if kind == "unparsed":
        complaints = describe_complaints([Complaint(**complaint) for complaint in content], graph)
        raise BuildFailed(f"{builder} cannot read {name}:\n{complaints or hearing.log.trouble()}")
    if kind == "failed":
        trouble = hearing.log.trouble()
        lines = [f"{failed}: {content}", trouble, modules_in(trouble, graph), way_out(f"{content}\n{trouble}")]
        raise BuildFailed("\n".join(line for line in lines if line))
    raise BuildFailed(_crashed(failed, hearing, ending, graph))


def _timed_out(failed: str, hearing: Hearing) -> str:
    return (
        f"{failed}: it took longer than time_limit_s allows, and was stopped.\n{hearing.log.trouble()}\n"
        "Raise time_limit_s, or build for fewer compute capabilities and profiles. A builder that is short of memory "
        "can stall, too"
    )


def _crashed(failed: str, hearing: Hearing, ending: Ending, graph: "onnx.GraphProto") -> str:
    from tnm_pipeline.export.building.complaints import modules_in

    node = hearing.log.last_node
    words = _last_words(hearing, ending)
    lines = [
        f"{failed}: its process ended with {ending.cause}.",
        words,
        f"The last node that it read is {node}" if node else "It had not read any node",
        modules_in(f"{words}\n{node}", graph),
        "If something else ended it on purpose, build again; if it crashed, report it to the builder's makers with the "
        "ONNX file, and run that with ONNX Runtime meanwhile",
    ]
    return "\n".join(line for line in lines if line)


def _last_words(hearing: Hearing, ending: Ending) -> str:
    return "\n".join([hearing.log.trouble(), *ending.said[-5:]])
