"""What a TensorRT builder said while it worked: it raises nothing, so its log is the only witness."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# TensorRT 10.x and later: "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c".
# Before: "(Sparsity) Layers eligible for sparse math: a, b, c", with nothing after the colon for none.
_COUNTED = {
    "eligible": re.compile(r"\(Sparsity\) Found (\d+) layer\(s\) eligible to use sparse tactics(?::(.*))?"),
    "picked": re.compile(r"\(Sparsity\) Chose (\d+) layer\(s\) using sparse tactics(?::(.*))?"),
}
_LISTED = {
    "eligible": re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)"),
    "picked": re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"),
}
_TROUBLE = ("WARNING", "ERROR", "INTERNAL_ERROR")
_SHOWN = 5
_NODE = re.compile(r"Parsing node: (.+) \[(\w+)\]")
_NO_MEMORY = re.compile(
    r"bad_alloc|out ?of ?memory|insufficient memory|ran out of memory|memory \(\d+ bytes\) could not be allocated"
    r"|MEM_ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)


@dataclass
class BuildLog:
    """Messages in the order they came, each with its severity's name (`"ERROR"`, `"VERBOSE"`, ...)."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Append one message."""
        self.messages.append((severity, text))

    def trouble(self, count: int = _SHOWN) -> str:
        """The last `count` warnings and errors, or else the last messages of any kind, one per line."""
        bad = [text for severity, text in self.messages if severity in _TROUBLE]
        return "\n".join((bad or [text for _, text in self.messages])[-count:]) or "the builder logged nothing"

    @property
    def eligible_layers(self) -> int | None:
        """Layers that the builder called eligible for sparse tactics; None when it did not say."""
        return self._last("eligible")[0]

    @property
    def picked_layers(self) -> int | None:
        """Layers for which the builder chose a sparse tactic; None when it did not say."""
        return self._last("picked")[0]

    @property
    def eligible_names(self) -> tuple[str, ...] | None:
        """Their names, of fused layers such as `"conv1 + relu1"`; None when it did not list as many as it counted."""
        return self._last("eligible")[1]

    @property
    def picked_names(self) -> tuple[str, ...] | None:
        """Their names, likewise."""
        return self._last("picked")[1]

    @property
    def last_node(self) -> str | None:
        """Name and operator of the last node that was read, None before the first: where a crash while reading was."""
        for _, text in reversed(self.messages):
            if found := _NODE.search(text):
                return f"{found[1]} ({found[2]})"
        return None

    def _last(self, kind: str) -> tuple[int | None, tuple[str, ...] | None]:
        """Count and names of the last pass over the tactics, which is the plan's."""
        for _, text in reversed(self.messages):
            if counted := _COUNTED[kind].search(text):
                count, names = int(counted[1]), _names(counted[2] or "")
                return count, names if len(names) == count else None
            if listed := _LISTED[kind].search(text):
                names = _names(listed[1])
                return len(names), names
        return None, None


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name for part in listed.split(", ") if (name := part.strip()))


def short_of_memory(log: BuildLog, said: Iterable[str] = ()) -> bool:
    """Whether a failed build blames memory in what it last complained of.

    Args:
        log: The builder's log. Earlier errors do not count: a tactic that does not fit is tried and left.
        said: The last lines that the process printed.
    """
    return bool(_NO_MEMORY.search("\n".join([log.trouble(), *said])))
